"""The paper's process: DDPM. Its network predicts the noise, v or x_0, and may learn the variance.

Ho et al. 2020 (https://arxiv.org/abs/2006.11239) and Nichol & Dhariwal 2021
(https://arxiv.org/abs/2102.09672). t is a step, 0 the cleanest.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.diffusion import gaussian, losses, predictions, schedules, times
from dit_jax.diffusion.process import Levels, Passes, Prediction, Rates


class DDPM(NamedTuple):
    """A `process.Process` over the steps of a Schedule.

    prediction: "noise", "v" or "x0". stratified: of `times.Draw`.
    """

    schedule: schedules.Schedule
    prediction: str = "noise"
    weight: losses.Weight = losses.Weight()
    stratified: bool = False

    @property
    def last_time(self):
        return self.schedule.num_steps - 1

    @property
    def shift(self):
        return None

    @property
    def passes(self):
        return Passes()

    @property
    def noise_scale(self):
        return 1.0

    def draw_time(self, key, shape):
        """Uniform steps."""
        if self.stratified:
            steps = self.schedule.num_steps * times.draw(times.Draw(stratified=True), key, shape)
            return jnp.minimum(steps.astype(jnp.int32), np.int32(self.last_time))
        first, end = np.int32(0), np.int32(self.schedule.num_steps)
        return jax.random.randint(key, shape, first, end, jnp.int32)

    def corrupt(self, x0, t, noise):
        return gaussian.q_sample(self.schedule, x0, t, noise)

    def losses(self, network, x0, t, noise):
        """The terms of `losses.objective`: loss, mse and, if the variance is learned, vb."""
        x_t = self.corrupt(x0, t, noise)
        known = self._known(*self.alpha_sigma(slice(None)))
        weight = None if self.weight.kind == "constant" else losses.loss_weight(self.weight, known)
        return losses.objective(
            *(self.schedule, network(x_t, t)),
            **{"x0": x0, "x_t": x_t, "t": t, "noise": noise},
            known=None if self.prediction == "noise" else known,
            weight=weight,
        )

    def _known(self, alpha, sigma):
        return predictions.coefficients(self.prediction, alpha, sigma)

    def network_time(self, t):
        return t

    def inputs(self, t, end):
        return {}

    def read(self, out, x, t):
        """(x0, noise) of the network's output at x and steps t (N,)."""
        tables = predictions.tables(self._known(*self.alpha_sigma(slice(None))))
        return predictions.look_up(tables, out[..., : x.shape[-1]], x, t)

    def alpha_sigma(self, t):
        alpha_bar = self.schedule.alpha_bar[t]
        return np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)

    def time_at(self, log_ratio):
        alpha, sigma = self.alpha_sigma(slice(None))
        gaps = np.abs(np.log(alpha / sigma) - np.asarray(log_ratio)[..., None])
        return gaps.argmin(axis=-1).astype(np.float64)

    def levels(self, num_steps):
        """num_steps: as of `schedules.keep_steps`, "250" or "ddim50"."""
        return self.levels_at(schedules.keep_steps(self.schedule.num_steps, num_steps)[::-1])

    def levels_at(self, time):
        """time: steps, descending and at least two."""
        kept = schedules.check_steps(self.schedule.num_steps, time)[::-1]
        # Computed like a schedule of fewer steps, so that both are equal to the last bit.
        alpha_bar = schedules.from_alpha_bar(self.schedule.alpha_bar[kept], kept).alpha_bar[::-1]
        alpha = np.append(np.sqrt(alpha_bar), 1.0)
        sigma = np.append(np.sqrt(1 - alpha_bar), 0.0)
        rates = Rates(sigma / alpha, alpha, np.zeros_like(alpha), np.ones_like(alpha))
        return Levels(alpha, sigma, np.append(kept[::-1], 0.0), rates)

    def reader(self, levels, *, clip_x0):
        """out: what is predicted, and then the variance code if the variance is learned."""
        # A Schedule, so that the tables are, in every bit, those of the respaced training steps.
        short = schedules.from_alpha_bar(levels.alpha[-2::-1] ** 2, levels.time[-2::-1])
        tables = predictions.tables(self._known(levels.alpha, levels.sigma))

        def read(out, x, i):
            t = levels.num_steps - 1 - i
            noise, code = losses.split_output(out, x.shape[-1])
            if self.prediction == "noise":
                x0 = gaussian.x0_from_noise(short, x, t, noise)
            else:
                x0, noise = predictions.look_up(tables, noise, x, i)
            if clip_x0:
                x0 = jnp.clip(x0, -1, 1)
                noise = gaussian.noise_from_x0(short, x, t, x0)
            return Prediction(x0, noise, gaussian.reverse_log_variance(short, x, t, code))

        return read
