"""Classifier-free guidance: a model of (x, t, y) becomes a denoiser of (x, t).

Shapes: N batch, H W grid, C channels. A denoiser maps x (N, H, W, C) and one step t () of the
diffusion that the model was trained on to the noise (N, H, W, C) and the variance code, None
where the model does not learn it.
"""

import jax
import jax.numpy as jnp

from dit_jax.diffusion.losses import split_output


def condition(model, y):
    """denoise(x, t) of the labels y (N,), without guidance."""

    def denoise(x, t):
        return split_output(model(x, jnp.broadcast_to(t, y.shape), y), x.shape[-1])

    return denoise


def guide(model, y, *, null_label, scale, channels, interval):
    """denoise(x, t) of the labels y (N,), guided (Ho & Salimans 2022): 1 is no guidance.

    Only the first `channels` channels of the noise are guided, and only at first <= t <= last of
    the interval (Kynkaanniemi et al. 2024); elsewhere the null label is not evaluated at all. The
    variance code is that of y.
    """
    plain = condition(model, y)
    both = condition(model, jnp.concatenate([y, jnp.full_like(y, null_label)]))  # of 2N

    def guided(x, t):
        noise, code = both(jnp.concatenate([x, x]), t)
        noise, null_noise = jnp.split(noise, 2)
        mixed = null_noise + scale * (noise - null_noise)
        noise = jnp.concatenate([mixed[..., :channels], noise[..., channels:]], axis=-1)
        return noise, None if code is None else code[: len(x)]

    def denoise(x, t):
        first, last = interval
        return jax.lax.cond((first <= t) & (t <= last), guided, plain, x, t)

    return denoise
