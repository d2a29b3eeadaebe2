"""Losses: the MSE, its weights, and the variational bound of the learned variance.

Shapes: N batch, C channels; x (N, ..., C) has any number of axes. Every loss is per example, (N,).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.diffusion import gaussian, predictions
from dit_jax.diffusion.process import at


def split_output(out, num_channels):
    """A model's output -> its prediction (N, ..., C) and its variance code, None if not learned."""
    noise = out[..., :num_channels]
    return noise, out[..., num_channels:] if out.shape[-1] > num_channels else None


class Weight(NamedTuple):
    """The factor of an example's squared error, by its signal-to-noise ratio SNR.

    "min_snr": Hang et al. 2023 (https://arxiv.org/abs/2303.09556); "soft_min_snr": Crowson et al.
    2024 (https://arxiv.org/abs/2401.11605); "p2": Choi et al. 2022
    (https://arxiv.org/abs/2204.00227). "velocity": that of an error of a path's velocity, as in
    JiT (Li & He 2025, https://arxiv.org/abs/2511.13720). gamma None: the usual one, of `GAMMAS`.
    """

    kind: str = "constant"
    gamma: float | None = None


GAMMAS = {"min_snr": 5.0, "soft_min_snr": 5.0, "p2": 1.0}


def loss_weight(weight, known, xp=np, *, rate=None):
    """The Weight's factors, for `predictions.Coefficients` (N,); xp: the NumPy to compute with.

    The papers give the weight w of an error of the noise: min(SNR, gamma) / SNR, gamma / (SNR +
    gamma) and (1 + SNR)^-gamma. An error of 1 in the output is one of alpha / d in the noise, see
    `predictions`. So the factor is w (alpha / d)^2, and a guess of x_0 has the same loss whatever
    is predicted. Of "velocity" w is (rate / alpha)^2, with the determinant of the velocity as rate.
    """
    if weight.kind == "constant":
        return xp.ones_like(known.alpha)
    if weight.kind == "velocity":
        return xp.square(rate / known.determinant)
    gamma = GAMMAS[weight.kind] if weight.gamma is None else weight.gamma
    signal, noise = known.alpha**2, known.sigma**2  # SNR = signal / noise, without dividing by 0
    factor = {
        "min_snr": xp.minimum(signal, gamma * noise),
        "soft_min_snr": gamma * noise * signal / (signal + gamma * noise),
        "p2": signal * (noise / (signal + noise)) ** gamma,
    }[weight.kind]
    return factor / known.determinant**2


def objective(schedule, out, *, x0, x_t, t, noise, known=None, weight=None):
    """{"loss", "mse"} and, if the variance is learned, "vb" of a model's output at (x_t, t).

    vb trains the variance only: the prediction is detached in it (Nichol & Dhariwal 2021, sec. 4).
    mse is in squared model units, vb in bits per dimension, loss is the sum of vb and mse times the
    weight. known: `predictions.Coefficients` of all steps, None if the noise is predicted; weight:
    a table over the steps, None for 1.
    """
    predicted, code = split_output(out, x0.shape[-1])
    wanted = noise
    if known is not None:
        wanted = at(known.p, t, x0) * x0 + at(known.q, t, x0) * noise
    mse = mean_square(predicted - wanted)
    terms = {"loss": mse if weight is None else at(weight, t, mse) * mse, "mse": mse}
    if code is None:
        return terms
    if known is not None:
        _, predicted = predictions.look_up(predictions.tables(known), predicted, x_t, t)
    vb = variational_bound(schedule, jax.lax.stop_gradient(predicted), code, x0=x0, x_t=x_t, t=t)
    return {"loss": terms["loss"] + vb, "mse": mse, "vb": vb}


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


def mean_square(error):
    """(N, ..., C) -> (N,)."""
    return _mean(jnp.square(error))


def _mean(x):
    return x.mean(axis=tuple(range(1, x.ndim)))
