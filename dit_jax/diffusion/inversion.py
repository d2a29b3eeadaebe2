"""Inversion of DDIM: from data to the noise from which DDIM makes them again.

Song et al. 2021, https://arxiv.org/abs/2010.02502, sec. 5.3. An image is edited by sampling from
that noise with another condition. Shapes: N batch, S steps.
"""

import jax
import jax.numpy as jnp

from dit_jax.diffusion import samplers
from dit_jax.diffusion.process import at


def run(predict, x, levels, *, iterations):
    """x (N, ..., C) at the last level, data -> x at level 0, noise.

    predict: of `process.predictor`; without guidance and without clipping of x0, with which steps
    of DDIM may have no inverse. Every step is solved for its start by fixed-point iterations, each
    a network call at the noisier level: with one it is diffusers' DDIMInverseScheduler, and with
    several the inverse of DDIM up to a tolerance (Pan et al. 2023, https://arxiv.org/abs/2309.04907).
    """
    ddim = samplers.ddim(levels)
    back = levels.rates.scale[:-1] / levels.rates.scale[1:]  # to the scale of the step's start

    def step(end, i):
        def improve(_, start):
            missed = end - ddim.step(predict, ddim.init(start), i, None).x
            return start + at(back, i, end) * missed

        return jax.lax.fori_loop(0, iterations, improve, end), None

    steps = jnp.arange(levels.num_steps, dtype=jnp.int32)[::-1]
    return jax.lax.scan(step, x, steps)[0]
