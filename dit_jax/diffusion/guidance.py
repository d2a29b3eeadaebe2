"""Classifier-free guidance: a model of x, t and its conditions becomes a network of (x, t).

Shapes: N batch, C channels, S steps; x (N, ..., C) has any number of axes, t () and the scale ()
are the same for all.
"""

import jax
import jax.numpy as jnp
import numpy as np


def condition(model, given):
    """network(x, t, **inputs) with the conditions `given`, {name: (N, ...)}, without guidance.

    model(x, t=..., **given) -> (N, ..., out) is the function of a DiT. inputs: scalars, the same
    for all; `given` comes before them.
    """

    def network(x, t, **inputs):
        inputs = {name: jnp.broadcast_to(each, x.shape[:1]) for name, each in inputs.items()}
        return model(x, t=jnp.broadcast_to(t, x.shape[:1]), **inputs | given)

    return network


def guide(model, given, *, nulls, channels):
    """network(x, t, scale) with the conditions `given`, guided by a scale (Ho & Salimans 2022).

    nulls: {name: null value} of the conditions that can be left out. Only the first `channels`
    channels of the prediction are guided. The variance code is the one of `given`. A scale of 1
    means no guidance: only the conditions `given` are evaluated then.
    """

    plain = condition(model, given)
    both = condition(model, join(given, with_nulls(given, nulls)))

    def guided(x, t, scale):
        out, null_out = jnp.split(both(jnp.concatenate([x, x]), t), 2)
        return mix(out, null_out, scale, channels=channels)

    def network(x, t, scale):
        return jax.lax.cond(scale == 1, lambda x, t, scale: plain(x, t), guided, x, t, scale)

    return network


def with_nulls(given, nulls):
    """The conditions `given`, with the null value of each that has one."""
    return {
        name: jnp.full_like(values, nulls[name]) if name in nulls else values
        for name, values in given.items()
    }


def join(given, others):
    """Both conditions as one batch: {name: (2N, ...)}."""
    return {name: jnp.concatenate([given[name], others[name]]) for name in given}


def mix(out, null_out, scale, *, channels):
    """The guided output of both passes, (N, ..., out)."""
    mixed = null_out + scale * (out - null_out)
    return jnp.concatenate([mixed[..., :channels], out[..., channels:]], axis=-1)


def scales(levels, *, scale, interval, schedule="constant"):
    """The scale of each step, (S,) float64: 1 if its time is not in first <= t <= last.

    interval: (first, last) in the process's time (Kynkaanniemi et al. 2024). It is decided by the
    time at which a step begins, for all network calls of the step. schedule: a name in `SCHEDULES`.
    """
    (first, last), time = interval, levels.time[:-1]
    ramp = SCHEDULES[schedule](1 - time / time[0])
    return np.where((first <= time) & (time <= last), scale * ramp + (1 - ramp), 1.0)


SCHEDULES = {  # the fraction of the guidance at u, from 0 for noise to 1 for data
    "constant": np.ones_like,
    "linear": lambda u: u,
    "cosine": lambda u: (1 - np.cos(np.pi * u)) / 2,
}


def edges(scales):
    """Where guidance begins or ends, (S,) bool: a multistep sampler must start anew there."""
    return np.diff(scales != 1, prepend=scales[0] != 1)
