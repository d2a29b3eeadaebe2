"""Exponential moving average of a tree of arrays."""

import jax
import jax.numpy as jnp


def decay_at(step, *, decay, warmup):
    """The decay of update number `step` (from 0).

    With warmup it rises as (1 + step) / (10 + step) up to `decay`, so that the EMA of a short run
    forgets the random start. Without, it is `decay` from the first step, as in the paper.
    """
    if not warmup:
        return decay
    step = jnp.asarray(step, jnp.float32)
    return jnp.minimum(decay, (1 + step) / (10 + step))


def update(ema, params, *, decay):
    """decay * ema + (1 - decay) * params, leaf by leaf."""
    return jax.tree.map(lambda average, new: average + (1 - decay) * (new - average), ema, params)
