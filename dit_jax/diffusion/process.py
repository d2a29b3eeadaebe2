"""What a diffusion process is: how data become noise, and what a network learns of it.

Every process here is x_t = alpha x_0 + sigma noise. A sampler needs only a table of levels and
predict(x, i) -> Prediction; it does not know which process these come from.
To add a process, write a class with the methods of `Process` (see `ddpm.DDPM`), and choose it in
`processes.make` by a field of `settings.Diffusion`. Shapes: N batch, S steps; x may have any number
of axes.
"""

from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np


class Levels(NamedTuple):
    """The noise levels of a sampling, from noise to data; the last, (1, 0), is the data.

    Each (S+1,) float64; alpha may be 0 at the first level, sigma is 0 at the last only. time: what
    the network gets at each level; the last one is not used.
    """

    alpha: np.ndarray
    sigma: np.ndarray
    time: np.ndarray

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


class Process(Protocol):
    """How data become noise, what is learned, and how it is read.

    t (N,) is the network's time, whole or real, from 0 to last_time. x0, noise and x_t (N, ..., C)
    are in model units.
    """

    @property
    def last_time(self):
        """The largest t."""

    def draw_time(self, key, shape):
        """Random t of the given shape."""

    def corrupt(self, x0, t, noise):
        """x_t of x0 and its noise."""

    def losses(self, network, x0, t, noise):
        """{"loss": (N,), other terms: (N,)}, where network(x_t, t) is the network's output."""

    def levels(self, spacing):
        """The Levels of a spacing, as "250"; UserError if the process has no such spacing."""

    def reader(self, levels, *, clip_x0):
        """read(out, x, i) -> Prediction from the network's output at level i. See `predictor`."""


def predictor(network, process, levels, *, clip_x0=False):
    """predict(x, i) -> Prediction at level i of x (N, ..., C); network(x, t) with scalar t.

    clip_x0: clips x0 to [-1, 1] and makes the noise consistent with it. That is right for pixels
    and wrong for latents, which have no bounds.
    """
    read, time = process.reader(levels, clip_x0=clip_x0), jnp.asarray(levels.time, jnp.float32)

    def predict(x, i):
        return read(network(x, time[i]), x, i)

    return predict


def at(table, i, x):
    """table[i] as float32, shaped to multiply x. table (S,), i () or (N,), x (N, ..., C)."""
    values = jnp.asarray(table, jnp.float32)[i]
    return values.reshape(values.shape + (1,) * (x.ndim - values.ndim))
