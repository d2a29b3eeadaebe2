"""The Gaussians of a diffusion: q, its posterior, the model's reverse step, KL and likelihood.

Shapes: N batch, H W grid, C channels. x0 and x_t are in model units, about [-1, 1]; t (N,) counts
the steps of the schedule; log variances are natural, KL and likelihood in nats.
"""

import jax
import jax.numpy as jnp
import numpy as np


def at(table, t):
    """table[t] as float32, ready to multiply x. table (S,), t (N,) -> (N, 1, 1, 1)."""
    return jnp.asarray(table, jnp.float32)[t].reshape(-1, 1, 1, 1)


def q_sample(schedule, x0, t, noise):
    """x_t ~ q(x_t | x_0), given its noise (Ho et al. 2020, eq. 4)."""
    signal, sigma = np.sqrt(schedule.alpha_bar), np.sqrt(1 - schedule.alpha_bar)
    return at(signal, t) * x0 + at(sigma, t) * noise


def x0_from_noise(schedule, x_t, t, noise):
    """The x0 that x_t and its noise imply."""
    reciprocal = 1 / schedule.alpha_bar
    return at(np.sqrt(reciprocal), t) * x_t - at(np.sqrt(reciprocal - 1), t) * noise


def noise_from_x0(schedule, x_t, t, x0):
    """The noise that x_t and its x0 imply."""
    reciprocal = 1 / schedule.alpha_bar
    return (at(np.sqrt(reciprocal), t) * x_t - x0) / at(np.sqrt(reciprocal - 1), t)


def posterior_mean(schedule, x0, x_t, t):
    """Mean of q(x_{t-1} | x_t, x_0) (Ho et al. 2020, eq. 7)."""
    beta, alpha_bar, previous = schedule.beta, schedule.alpha_bar, schedule.alpha_bar_prev
    of_x0 = beta * np.sqrt(previous) / (1 - alpha_bar)
    of_x_t = (1 - previous) * np.sqrt(1 - beta) / (1 - alpha_bar)
    return at(of_x0, t) * x0 + at(of_x_t, t) * x_t


def reverse_log_variance(schedule, t, code):
    """log of the variance of p(x_{t-1} | x_t).

    code (N, H, W, C), -1 to 1, not clamped, interpolates between the posterior's and beta (Nichol
    & Dhariwal 2021, eq. 15). None where the variance is not learned: beta then, of shape (N, 1,
    1, 1), and at step 0 the posterior's of step 1.
    """
    if code is None:
        fixed = np.append(schedule.posterior_variance[1], schedule.beta[1:])
        return at(np.log(fixed), t)
    fraction = (code + 1) / 2
    largest, smallest = at(np.log(schedule.beta), t), at(schedule.posterior_log_variance, t)
    return fraction * largest + (1 - fraction) * smallest


def kl_divergence(mean1, log_variance1, mean2, log_variance2):
    """KL(N1 || N2) of each element, in nats."""
    return 0.5 * (
        log_variance2
        - log_variance1
        - 1
        + jnp.exp(log_variance1 - log_variance2)
        + jnp.square(mean1 - mean2) * jnp.exp(-log_variance2)
    )


def discretized_log_likelihood(x0, mean, log_variance):
    """log P of each x0 among 256 levels in [-1, 1], the two ends open (Ho et al. 2020, eq. 13)."""
    inverse_sigma = jnp.exp(-0.5 * log_variance)
    above = _normal_cdf(inverse_sigma * (x0 - mean + 1 / 255))
    below = _normal_cdf(inverse_sigma * (x0 - mean - 1 / 255))
    probability = jnp.where(x0 < -0.999, above, jnp.where(x0 > 0.999, 1 - below, above - below))
    return jnp.log(jnp.maximum(probability, 1e-12))


def _normal_cdf(x):
    # As the official code: a tanh approximation of the normal distribution function, in float32,
    # whose rounding next to 0 and 1 shows in the tails. XLA's own tanh is coarser there.
    tanh = 2 * jax.nn.sigmoid(2 * np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)) - 1
    return 0.5 * (1 + tanh)
