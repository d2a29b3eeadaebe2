"""The paper's process: DDPM with a learned variance, trained to predict the noise.

Ho et al. 2020 (https://arxiv.org/abs/2006.11239) and Nichol & Dhariwal 2021
(https://arxiv.org/abs/2102.09672). t is a step, 0 the cleanest.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.diffusion import gaussian, losses, schedules
from dit_jax.diffusion.process import Levels, Prediction


class DDPM(NamedTuple):
    """A `process.Process` over the steps of a Schedule."""

    schedule: schedules.Schedule

    @property
    def last_time(self):
        return self.schedule.num_steps - 1

    def draw_time(self, key, shape):
        """Uniform steps."""
        first, end = np.int32(0), np.int32(self.schedule.num_steps)
        return jax.random.randint(key, shape, first, end, jnp.int32)

    def corrupt(self, x0, t, noise):
        return gaussian.q_sample(self.schedule, x0, t, noise)

    def losses(self, network, x0, t, noise):
        """The paper's objective: "loss", "mse" and, if the variance is learned, "vb"."""
        x_t = self.corrupt(x0, t, noise)
        out = network(x_t, t)
        return losses.objective(self.schedule, out, x0=x0, x_t=x_t, t=t, noise=noise)

    def levels(self, spacing):
        """spacing: as of `schedules.respace`, "250" or "ddim50"."""
        short = schedules.respace(self.schedule, spacing)
        alpha, sigma = np.sqrt(short.alpha_bar), np.sqrt(1 - short.alpha_bar)
        return Levels(
            np.append(alpha[::-1], 1.0),
            np.append(sigma[::-1], 0.0),
            np.append(short.timestep[::-1], 0.0),
        )

    def reader(self, levels, *, clip_x0):
        """out: the noise, and then the variance code if the variance is learned."""
        # A Schedule, so that the tables are, in every bit, those of the respaced training steps.
        short = schedules.from_alpha_bar(levels.alpha[-2::-1] ** 2, levels.time[-2::-1])

        def read(out, x, i):
            t = levels.num_steps - 1 - i
            noise, code = losses.split_output(out, x.shape[-1])
            x0 = gaussian.x0_from_noise(short, x, t, noise)
            if clip_x0:
                x0 = jnp.clip(x0, -1, 1)
                noise = gaussian.noise_from_x0(short, x, t, x0)
            return Prediction(x0, noise, gaussian.reverse_log_variance(short, x, t, code))

        return read
