"""What a diffusion process is: how data become noise, and what a network learns of it.

Every process here is x_t = alpha x_0 + sigma noise. A sampler needs only a table of levels and
predict(x, i) -> Prediction; it does not know which process these come from.
To add a process, write a class with the methods of `Process` (see `ddpm.DDPM`), and choose it in
`processes.make` by a field of `settings.Diffusion`. Shapes: N batch, S steps; x may have any number
of axes.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np


class Rates(NamedTuple):
    """How x moves along the levels without added noise: what Euler's and Heun's methods step in.

    Each (S+1,) float64. x = scale y, and dy / d coordinate = d_alpha x_0 + d_sigma noise. The
    coordinate falls from level to level, and its last is 0. On a path it is the time, and scale is
    1: dy / d coordinate is the velocity. For DDPM it is sigma / alpha, and scale is alpha, so that
    dy / d coordinate is the noise (Karras et al. 2022, eq. 4, and Song et al. 2021, eq. 14).
    """

    coordinate: np.ndarray
    scale: np.ndarray
    d_alpha: np.ndarray
    d_sigma: np.ndarray


class Levels(NamedTuple):
    """The noise levels of a sampling, from noise to data; the last, (1, 0), is the data.

    Each (S+1,) float64; alpha may be 0 at the first level, sigma is 0 at the last only. time: the
    process's time t at each level; the last is 0. rates: None for levels made by hand.
    """

    alpha: np.ndarray
    sigma: np.ndarray
    time: np.ndarray
    rates: Rates | None = None

    @property
    def num_steps(self):
        return len(self.alpha) - 1


class Prediction(NamedTuple):
    """What a network says of x at a level: x0 and noise, like x.

    log_variance: of the reverse step from that level, broadcastable to x; None if the process has
    none.
    """

    x0: jax.Array
    noise: jax.Array
    log_variance: jax.Array | None = None


class Passes(NamedTuple):
    """What the loss of an example computes beside one forward and backward pass of the network.

    forwards: passes that are not differentiated. tangents: derivatives of a pass along a direction
    (jvp).
    """

    forwards: int = 0
    tangents: int = 0


class Process(Protocol):
    """How data become noise, what is learned, and how it is read.

    t (N,) is the process's time, whole or real, from 0, the data, to last_time, the noise: a step
    of DDPM, or the time of a path, 0 to 1. Guidance intervals count in it too. The network may get
    another number: `network_time(t)`; see `timed`. x0, noise and x_t (N, ..., C) are in model
    units.
    """

    @property
    def last_time(self):
        """The largest t."""

    @property
    def shift(self):
        """The factor of `times.shift` of a path; None if t are whole steps.

        A path also has `least_steps`, the fewest steps of a sampling.
        """

    @property
    def passes(self):
        """The `Passes` of `losses`."""

    @property
    def noise_scale(self):
        """The standard deviation of x at level 0, from which sampling starts."""

    def draw_time(self, key, shape):
        """Random t of the given shape, (N,) for the global batch.

        A process may draw a dict with more numbers of each example; its `losses` then take that.
        """

    def network_time(self, t):
        """What the network's embedder gets at t."""

    def inputs(self, t, end):
        """{name: like t}: what the network takes beside t and an example's own conditions.

        It is for a step from t to `end`; a call that is no step has end = t.
        """

    def corrupt(self, x0, t, noise):
        """x_t of x0 and its noise."""

    def losses(self, network, x0, t, noise):
        """{"loss": (N,), other terms: (N,)}. network: a `Network`; t: of `draw_time`."""

    def read(self, out, x, t):
        """(x0, noise) of the network's output at x and t (N,), finite in value and gradient."""

    def alpha_sigma(self, t):
        """(alpha, sigma) at times t as NumPy float64, like t."""

    def time_at(self, log_ratio):
        """The times where log(alpha / sigma) is log_ratio, NumPy float64; DDPM: the nearest steps.

        Times outside the process are those of its ends.
        """

    def levels(self, num_steps):
        """The Levels of so many steps, as "250", in the process's own spacing; else UserError."""

    def levels_at(self, time):
        """The Levels that pass the times (S,), descending, and then the data.

        UserError if they do not descend, or if the process has no such times: the first must be at
        most `levels("250").time[0]`, and the last above 0 on a path, at least 0 for DDPM.
        """

    def reader(self, levels, *, clip_x0):
        """read(out, x, i) -> Prediction from the network's output at level i. See `predictor`."""


class Network(NamedTuple):
    """A DiT as a loss sees it: network(x, t) is its output for the conditions of the examples.

    apply(x, t=..., **given): of the DiT, with t in the process's time. given: {name: (N, ...)}.
    nulls: {name: null value} of the conditions that can be left out. dropped: the examples that go
    without these, (N,) or one bool for all. A call may give or replace conditions by name.
    """

    apply: Callable
    given: dict
    nulls: dict
    dropped: jax.Array | bool = False

    def __call__(self, x, t, **more):
        given = self.given
        if self.dropped is not False:
            given = {name: self._drop(name, values) for name, values in given.items()}
        return self.apply(x, t=t, **given | more)

    def _drop(self, name, values):
        return jnp.where(self.dropped, self.nulls[name], values) if name in self.nulls else values


def timed(apply, process):
    """apply(params, x, t=..., **given) with t in the process's time, of a DiT's own function."""

    def at_time(params, x, *, t, **given):
        given = process.inputs(t, t) | given
        return apply(params, x, t=process.network_time(t), **given)

    return at_time


def predictor(network, process, levels, *, clip_x0=False, scales=None):
    """predict(x, i, step=i) -> Prediction at level i of x (N, ..., C).

    network(x, t, **inputs) with scalar t and `Process.inputs` of the step from level i; with scales
    (S,), those of the guidance of each step, network(x, t, scale, **inputs). step: the one that
    asks; a sampler that looks ahead asks at level i for an earlier step.
    clip_x0: clips x0 to [-1, 1] and makes the noise consistent with it. That is right for pixels
    and wrong for latents, which have no bounds.
    """
    read, time = process.reader(levels, clip_x0=clip_x0), jnp.asarray(levels.time, jnp.float32)
    table = None if scales is None else jnp.asarray(scales, jnp.float32)
    inputs = process.inputs(levels.time[:-1], levels.time[1:])
    inputs = {name: jnp.asarray(values, jnp.float32) for name, values in inputs.items()}

    def predict(x, i, step=None):
        scale = () if table is None else (table[i if step is None else step],)
        given = {name: values[i] for name, values in inputs.items()}
        return read(network(x, time[i], *scale, **given), x, i)

    return predict


def at(table, i, x):
    """table[i] as float32, shaped to multiply x. table (S,), i () or (N,), x (N, ..., C)."""
    values = jnp.asarray(table, jnp.float32)[i]
    return values.reshape(values.shape + (1,) * (x.ndim - values.ndim))
