"""Samplers: from noise x_T to x_0, each one `lax.scan` over the steps of a schedule.

Shapes: N batch, H W grid, C channels, S steps. They take denoise(x, t) -> noise, code (see
`guidance`) and know of no label. The noise that they add at step i is drawn from `keys` (N,), one
for each example, so that a sample does not depend on its batch; or it is handed in as `noise`
(S, N, H, W, C), where noise[i] belongs to step i. With clip_x0 the x0 implied at each step is
clipped to [-1, 1]: right for pixels, wrong for latents, which have no bounds.
"""

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.diffusion import gaussian


def draw_noise(keys, step, shape):
    """Normal noise of a step for examples of `shape`: (N, *shape). x_T is that of step S."""

    def draw(key):
        return jax.random.normal(jax.random.fold_in(key, step), shape)

    return jax.vmap(draw)(keys)


def ddpm(denoise, x, schedule, *, clip_x0=False, keys=None, noise=None):
    """Ancestral sampling with the learned variance, if there is one (Ho et al. 2020, alg. 2)."""
    draw = _noise_source(x, keys, noise)

    def step(x, i):
        t = jnp.full(len(x), i)  # (N,)
        predicted, code = denoise(x, _timestep(schedule, i))
        x0 = gaussian.x0_from_noise(schedule, x, t, predicted)
        if clip_x0:
            x0 = jnp.clip(x0, -1, 1)
        mean = gaussian.posterior_mean(schedule, x0, x, t)
        log_variance = gaussian.reverse_log_variance(schedule, t, code)
        sigma = jnp.where(i == 0, 0.0, jnp.exp(0.5 * log_variance))
        return mean + sigma * draw(i), None

    return _run(step, x, schedule)


def ddim(denoise, x, schedule, *, eta=0.0, clip_x0=False, keys=None, noise=None):
    """Song et al. 2021, eq. 12 and 16; eta 0 is deterministic and needs neither keys nor noise."""
    draw = _noise_source(x, keys, noise) if eta else None
    alpha_bar, previous = schedule.alpha_bar, schedule.alpha_bar_prev
    sigma = eta * np.sqrt((1 - previous) / (1 - alpha_bar) * (1 - alpha_bar / previous))
    direction = np.sqrt(1 - previous - sigma**2)

    def step(x, i):
        t = jnp.full(len(x), i)  # (N,)
        predicted, _ = denoise(x, _timestep(schedule, i))
        x0 = gaussian.x0_from_noise(schedule, x, t, predicted)
        if clip_x0:
            x0 = jnp.clip(x0, -1, 1)
            predicted = gaussian.noise_from_x0(schedule, x, t, x0)
        x = gaussian.at(np.sqrt(previous), t) * x0 + gaussian.at(direction, t) * predicted
        if eta:
            x = x + gaussian.at(sigma, t) * draw(i)  # sigma is 0 at step 0
        return x, None

    return _run(step, x, schedule)


SAMPLERS = {"ddpm": ddpm, "ddim": ddim}


def _timestep(schedule, i):
    return jnp.asarray(schedule.timestep, jnp.int32)[i]


def _noise_source(x, keys, noise):
    if (keys is None) == (noise is None):
        raise ValueError("either keys or noise must be given, and not both")
    if noise is not None:
        noise = jnp.asarray(noise)
        return lambda i: noise[i]
    return lambda i: draw_noise(keys, i, x.shape[1:])


def _run(step, x, schedule):
    steps = jnp.arange(schedule.num_steps - 1, -1, -1)
    return jax.lax.scan(step, x, steps)[0]
