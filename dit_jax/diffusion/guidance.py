"""Classifier-free guidance: a model of x, t and its conditions becomes a network of (x, t).

Shapes: N batch, C channels; x (N, ..., C) has any number of axes, t () is the same for all.
"""

import jax
import jax.numpy as jnp


def condition(model, given):
    """network(x, t) with the conditions `given`, {name: (N, ...)}, without guidance.

    model(x, t=..., **given) -> (N, ..., out) is the function of a DiT.
    """

    def network(x, t):
        return model(x, t=jnp.broadcast_to(t, x.shape[:1]), **given)

    return network


def guide(model, given, *, nulls, scale, channels, interval):
    """network(x, t) with the conditions `given`, guided by `scale` (Ho & Salimans 2022).

    nulls: {name: null value} of the conditions that can be left out. Only the first `channels`
    channels of the prediction are guided, and only at times first <= t <= last of the interval
    (Kynkaanniemi et al. 2024), counted in the network's time; at other times only the conditions
    `given` are evaluated. The variance code is the one of `given`. A scale of 1 changes nothing:
    `condition` does the same with half the work.
    """

    def null_like(name, values):
        return jnp.full_like(values, nulls[name]) if name in nulls else values

    plain = condition(model, given)
    both = condition(
        model,
        {
            name: jnp.concatenate([values, null_like(name, values)])  # (2N, ...)
            for name, values in given.items()
        },
    )

    def guided(x, t):
        out, null_out = jnp.split(both(jnp.concatenate([x, x]), t), 2)
        mixed = null_out + scale * (out - null_out)
        return jnp.concatenate([mixed[..., :channels], out[..., channels:]], axis=-1)

    def network(x, t):
        first, last = interval
        return jax.lax.cond((first <= t) & (t <= last), guided, plain, x, t)

    return network
