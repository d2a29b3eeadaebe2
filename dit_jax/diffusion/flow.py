"""Flow matching: a path from data to noise in continuous time, and what is learned along it.

Lipman et al. 2023 (https://arxiv.org/abs/2210.02747) and SiT, Ma et al. 2024
(https://arxiv.org/abs/2401.08740). t is 0 for data and 1 for noise. SiT counts the other way, and
calls the noise x_0. Shapes: N batch, S steps.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
import numpy as np

from dit_jax.diffusion import fields, losses, predictions, times
from dit_jax.diffusion.process import Levels, Passes, Prediction, Rates, at
from dit_jax.errors import UserError

EDGE = 1e-3  # as SiT: the noise and x_0 are learned and asked for at t in EDGE .. 1 - EDGE only
CLIP = 0.05  # as JiT: how near the ends the velocity of a predicted x0 or noise is computed
HALF_PI = np.pi / 2


def linear(t, xp):
    """alpha, sigma and their derivatives by t: the straight path of rectified flow. xp: a NumPy."""
    one = xp.ones_like(t)
    return 1 - t, t, -one, one


def gvp(t, xp):
    """The same of the path that preserves the variance, on a circle (SiT, eq. 14)."""
    alpha, sigma = xp.sin(HALF_PI * (1 - t)), xp.sin(HALF_PI * t)  # exactly 0 at the ends
    return alpha, sigma, -HALF_PI * sigma, HALF_PI * alpha


PATHS = {"linear": linear, "gvp": gvp}


@dataclasses.dataclass(frozen=True)
class Flow:
    """A `process.Process` along a path.

    prediction: "velocity", dx / dt, or "noise", "v", "x0". The network gets time_scale t; with
    reverse_time it gets time_scale (1 - t), and its velocity is the negative one, as SiT's. shift:
    of `times.shift`. A second half of the output, which SiT's checkpoints have, is not used.
    noise_scale: multiplies the noise, so sigma is the path's times this. With the weight "velocity"
    the loss and the samplers use the velocity of a prediction, as JiT. On the linear path that of
    an x0 is (x - x0) / max(t, CLIP), and that of a noise divides by max(1 - t, CLIP).
    """

    path: str
    prediction: str = "velocity"
    draw: times.Draw = times.Draw()
    shift: float = 1.0
    time_scale: float = 1000.0
    reverse_time: bool = False
    weight: losses.Weight = losses.Weight()
    noise_scale: float = 1.0
    least_steps: ClassVar[int] = 2  # of a sampling

    @property
    def last_time(self):
        return 1

    @property
    def passes(self):
        return Passes()

    @property
    def clips_velocity(self):
        """Whether the loss and the samplers use the velocity of what is predicted."""
        return self.weight.kind == "velocity"

    @property
    def edges(self):
        """The first and the last t at which the network is trained."""
        is_open = self.prediction in ("noise", "x0") and not self.clips_velocity
        return (EDGE, 1 - EDGE) if is_open else (0.0, 1.0)

    def draw_time(self, key, shape):
        first, last = self.edges
        t = times.shift(first + (last - first) * times.draw(self.draw, key, shape), self.shift)
        return jnp.clip(t, first, last)

    def network_time(self, t):
        return self.time_scale * (1 - t if self.reverse_time else t)

    def inputs(self, t, end):
        return {}

    def corrupt(self, x0, t, noise):
        known = self._known(_beside(t, x0))
        return known.alpha * x0 + known.sigma * noise

    def losses(self, network, x0, t, noise):
        """{"loss", "mse"}: squared errors of the prediction, with and without the weight."""
        known = self._known(_beside(t, x0))
        x_t = known.alpha * x0 + known.sigma * noise
        out = network(x_t, t)[..., : x0.shape[-1]]
        mse = losses.mean_square(out - predictions.target(known, x0, noise))
        inside = self._readable(jnp.asarray(t, jnp.float32))
        factor = losses.loss_weight(self.weight, inside, jnp, rate=self._rate(t))
        return {"loss": factor * mse, "mse": mse}

    def read(self, out, x, t):
        """(x0, noise) of the network's output at x and any t (N,), finite at both ends."""
        known = self._readable(_beside(t, x))
        return predictions.read(known, out[..., : x.shape[-1]], x)

    def alpha_sigma(self, t):
        return self._path(np.asarray(t, np.float64), np)[:2]

    def time_at(self, log_ratio):
        ratio = np.exp(-np.asarray(log_ratio, np.float64)) / self.noise_scale  # of the path
        return ratio / (1 + ratio) if self.path == "linear" else np.arctan(ratio) / HALF_PI

    def levels(self, num_steps):
        """num_steps: as "50": so many equal steps of t, before the shift."""
        first = self.edges[1]
        time = np.linspace(first, 0, fields.path_steps(num_steps, self.least_steps) + 1)[:-1]
        return self.levels_at(np.minimum(times.shift(time, self.shift), first))

    def levels_at(self, time):
        time, last = np.asarray(time, np.float64), self.edges[1]
        if time.ndim != 1 or not len(time) or not (np.diff(time) < 0).all():
            raise UserError(f"times must be numbers, descending, got {time.tolist()}")
        if not time[0] <= last or not time[-1] > 0:
            raise UserError(
                f"times must be above 0 and at most {last:g} for a prediction of "
                f"{self.prediction}, got {time[0]:g} to {time[-1]:g}"
            )
        time = np.append(time, 0.0)
        alpha, sigma, d_alpha, d_sigma = self._path(time, np)
        rates = Rates(time, np.ones_like(time), d_alpha, d_sigma)
        return Levels(alpha, sigma, time, rates)

    def reader(self, levels, *, clip_x0):
        known = (self._readable if self.clips_velocity else self._known)(levels.time, np)
        tables = predictions.tables(known)

        def read(out, x, i):
            x0, noise = predictions.look_up(tables, out[..., : x.shape[-1]], x, i)
            if clip_x0:
                x0 = jnp.clip(x0, -1, 1)
                noise = (x - at(levels.alpha, i, x) * x0) / at(levels.sigma, i, x)
            return Prediction(x0, noise)

        return read

    def _path(self, t, xp=jnp):
        """alpha, sigma and their derivatives at t."""
        alpha, sigma, d_alpha, d_sigma = PATHS[self.path](t, xp)
        return alpha, sigma * self.noise_scale, d_alpha, d_sigma * self.noise_scale

    def _rate(self, t, xp=jnp):
        """The determinant of the velocity: an error of 1 in an output is one of rate / d in it."""
        alpha, sigma, d_alpha, d_sigma = self._path(t, xp)
        return alpha * d_sigma - sigma * d_alpha

    def _readable(self, t, xp=jnp):
        """The `predictions.Coefficients` by which an output at t is read, finite at both ends.

        They are those at the nearest edge. With `clips_velocity` they are those at t, and beyond
        CLIP a multiple of the velocity is added to what is predicted, so that the determinant is
        that at CLIP: this clips the divisor of the velocity.
        """
        if not self.clips_velocity:
            return self._known(xp.clip(t, *self.edges), xp)
        known, (_, _, d_alpha, d_sigma) = self._known(t, xp), self._path(t, xp)
        first, last = {"x0": (CLIP, 1.0), "noise": (0.0, 1 - CLIP)}.get(self.prediction, (0.0, 1.0))
        determinant = self._known(xp.clip(t, first, last), xp).determinant
        share = (determinant - known.determinant) / self._rate(t, xp)
        return known._replace(p=known.p + share * d_alpha, q=known.q + share * d_sigma)

    def _known(self, t, xp=jnp):
        """The `predictions.Coefficients` of what is predicted at t."""
        alpha, sigma, d_alpha, d_sigma = self._path(t, xp)
        sign = -1 if self.reverse_time else 1
        return predictions.coefficients(
            self.prediction, alpha, sigma, d_alpha=sign * d_alpha, d_sigma=sign * d_sigma
        )


def _beside(t, x):
    """t (N,) or () as float32, shaped to multiply x (N, ..., C)."""
    t = jnp.asarray(t, jnp.float32)
    return t.reshape(t.shape + (1,) * (x.ndim - t.ndim))
