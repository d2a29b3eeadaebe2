"""How training draws its times, as fractions of the process: 0 is data, 1 is noise.

Esser et al. 2024 (Stable Diffusion 3, https://arxiv.org/abs/2403.03206), sec. 3.1 and eq. 23.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Draw(NamedTuple):
    """law: "uniform", or "logit_normal": the logit of t is normal with this mean and std.

    stratified: example i of N is drawn from the i-th of N equally likely intervals. A batch as a
    whole has the same law, and its mean varies less.
    """

    law: str = "uniform"
    mean: float = 0.0
    std: float = 1.0
    stratified: bool = False


def draw(how, key, shape):
    """Random times of the shape (N,), float32 in [0, 1]."""
    if how.law == "logit_normal" and not how.stratified:
        return logit_normal(jax.random.normal(key, shape, jnp.float32), how.mean, how.std)
    uniform = jax.random.uniform(key, shape, jnp.float32)
    if how.stratified:
        uniform = (jnp.arange(shape[0], dtype=jnp.float32) + uniform) / shape[0]
    if how.law == "uniform":
        return uniform
    return logit_normal(jax.scipy.special.ndtri(uniform), how.mean, how.std)


def logit_normal(normal, mean, std):
    """The time of a standard normal number."""
    return jax.nn.sigmoid(mean + std * normal)


def shift(t, factor):
    """t as if sigma / alpha of the linear path were `factor` times as large (SD3, eq. 23)."""
    return factor * t / (1 + (factor - 1) * t)
