"""Moving averages of a tree of arrays: exponential, and with powers of the step as weights."""

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
    return mix(ema, params, weight=1 - decay)


def mix(average, params, *, weight):
    """(1 - weight) * average + weight * params, leaf by leaf."""
    return jax.tree.map(lambda old, new: old + weight * (new - old), average, params)


def power_weight(step, *, exponent):
    """The weight of the new parameters in a power-function average at update `step` (from 0).

    It is 1 - (1 - 1/k)^(exponent + 1) with k = step + 1, so the first parameters are taken whole.
    See `power_ema`.
    """
    k = jnp.asarray(step, jnp.float32) + 1
    # Without these functions float32 would lose 5 digits of a small weight.
    return -jnp.expm1((exponent + 1) * jnp.log1p(-1 / k))
