"""The paper's objective: noise MSE plus the variational bound of the learned variance.

Shapes: N batch, C channels; x (N, ..., C) has any number of axes. Every loss is per example, (N,).
"""

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.diffusion import gaussian
from dit_jax.diffusion.process import at


def split_output(out, num_channels):
    """A model's output -> its prediction (N, ..., C) and its variance code, None if not learned."""
    noise = out[..., :num_channels]
    return noise, out[..., num_channels:] if out.shape[-1] > num_channels else None


def objective(schedule, out, *, x0, x_t, t, noise):
    """{"loss", "mse"} and, if the variance is learned, "vb" of a model's output at (x_t, t).

    vb trains the variance only: the predicted noise is detached in it (Nichol & Dhariwal 2021,
    sec. 4). mse is in squared model units, vb in bits per dimension, loss is their sum.
    """
    predicted, code = split_output(out, x0.shape[-1])
    mse = _mean(jnp.square(predicted - noise))
    if code is None:
        return {"loss": mse, "mse": mse}
    vb = variational_bound(schedule, jax.lax.stop_gradient(predicted), code, x0=x0, x_t=x_t, t=t)
    return {"loss": mse + vb, "mse": mse, "vb": vb}


def variational_bound(schedule, noise, code, *, x0, x_t, t):
    """KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), at step 0 -log p(x_0 | x_1); bits (N,)."""
    log_variance = gaussian.reverse_log_variance(schedule, x_t, t, code)
    predicted_x0 = gaussian.x0_from_noise(schedule, x_t, t, noise)
    mean = gaussian.posterior_mean(schedule, predicted_x0, x_t, t)
    kl = gaussian.kl_divergence(
        gaussian.posterior_mean(schedule, x0, x_t, t),
        at(schedule.posterior_log_variance, t, x_t),
        mean,
        log_variance,
    )
    # As the official code: 256 levels, even if x0 is a latent.
    nll = -gaussian.discretized_log_likelihood(x0, mean, log_variance)
    return jnp.where(t == 0, _mean(nll), _mean(kl)) / np.log(2).astype(np.float32)


def _mean(x):
    return x.mean(axis=tuple(range(1, x.ndim)))
