"""The Gaussians of DDPM: q, its posterior, the model's reverse step, KL and likelihood.

Shapes: N batch; x0 and x_t (N, ..., C) have any number of axes and are in model units, about
[-1, 1]. t, () or (N,), is a step of the schedule. Variances are given as natural logarithms, KL and
likelihood in nats.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.diffusion.process import at


def q_sample(schedule, x0, t, noise):
    """x_t ~ q(x_t | x_0), given its noise (Ho et al. 2020, eq. 4)."""
    signal, sigma = np.sqrt(schedule.alpha_bar), np.sqrt(1 - schedule.alpha_bar)
    return at(signal, t, x0) * x0 + at(sigma, t, x0) * noise


def x0_from_noise(schedule, x_t, t, noise):
    """x0, given x_t and its noise."""
    reciprocal = 1 / schedule.alpha_bar
    return at(np.sqrt(reciprocal), t, x_t) * x_t - at(np.sqrt(reciprocal - 1), t, x_t) * noise


def noise_from_x0(schedule, x_t, t, x0):
    """The noise in x_t, given x0."""
    reciprocal = 1 / schedule.alpha_bar
    return (at(np.sqrt(reciprocal), t, x_t) * x_t - x0) / at(np.sqrt(reciprocal - 1), t, x_t)


def posterior_mean(schedule, x0, x_t, t):
    """Mean of q(x_{t-1} | x_t, x_0) (Ho et al. 2020, eq. 7)."""
    beta, alpha_bar, previous = schedule.beta, schedule.alpha_bar, schedule.alpha_bar_prev
    of_x0 = beta * np.sqrt(previous) / (1 - alpha_bar)
    of_x_t = (1 - previous) * np.sqrt(1 - beta) / (1 - alpha_bar)
    return at(of_x0, t, x0) * x0 + at(of_x_t, t, x_t) * x_t


def reverse_log_variance(schedule, x_t, t, code):
    """log of the variance of p(x_{t-1} | x_t), broadcastable to x_t.

    code (N, ..., C), in about [-1, 1] but not clamped, interpolates between the variance of the
    posterior and beta (Nichol & Dhariwal 2021, eq. 15). code None: the variance is not learned; it
    is beta; at step 0, the posterior variance of step 1.
    """
    if code is None:
        fixed = np.append(schedule.posterior_variance[1], schedule.beta[1:])
        return at(np.log(fixed), t, x_t)
    fraction = (code + 1) / 2
    largest = at(np.log(schedule.beta), t, x_t)
    smallest = at(schedule.posterior_log_variance, t, x_t)
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
    """log P of each x0, binned to 256 levels in [-1, 1] with open ends (Ho et al. 2020, eq. 13)."""
    inverse_sigma = jnp.exp(-0.5 * log_variance)
    above = _normal_cdf(inverse_sigma * (x0 - mean + 1 / 255))
    below = _normal_cdf(inverse_sigma * (x0 - mean - 1 / 255))
    probability = jnp.where(x0 < -0.999, above, jnp.where(x0 > 0.999, 1 - below, above - below))
    return jnp.log(jnp.maximum(probability, 1e-12))


def _normal_cdf(x):
    # As the official code: a tanh approximation of the normal distribution function in float32.
    # Its rounding near 0 and 1 shows in the tails, where XLA's own tanh is coarser.
    tanh = 2 * jax.nn.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)) - 1
    return 0.5 * (1 + tanh)
