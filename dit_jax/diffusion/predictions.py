"""What a network can predict at x = alpha x_0 + sigma noise, and how it gives x_0 and noise.

Every prediction is p x_0 + q noise with known p and q; so is x. Two equations give x_0 and noise:

    x_0 = (q x - sigma out) / d,  noise = (alpha out - p x) / d,  d = alpha q - sigma p

and with them every other prediction. Coefficients are NumPy or jax arrays that multiply x.
v: Salimans & Ho 2022 (https://arxiv.org/abs/2202.00512), app. D. velocity: dx / dt of a path
(Lipman et al. 2023, https://arxiv.org/abs/2210.02747).
"""

from typing import NamedTuple

import numpy as np

from dit_jax.diffusion.process import at


class Coefficients(NamedTuple):
    """alpha and sigma of x, and p and q of what is predicted."""

    alpha: np.ndarray
    sigma: np.ndarray
    p: np.ndarray
    q: np.ndarray

    @property
    def determinant(self):
        """d; 0 where x and the output do not determine both x_0 and the noise."""
        return self.alpha * self.q - self.sigma * self.p


def coefficients(prediction, alpha, sigma, *, d_alpha=None, d_sigma=None):
    """The Coefficients of a prediction by name; d_alpha, d_sigma: of a path, by its time."""
    zero = 0 * alpha
    p, q = {
        "noise": (zero, zero + 1),
        "x0": (zero + 1, zero),
        "v": (-sigma, alpha),
        "velocity": (d_alpha, d_sigma),
    }[prediction]
    return Coefficients(alpha, sigma, p, q)


def target(known, x0, noise):
    """What the network should predict."""
    return known.p * x0 + known.q * noise


def read(known, out, x):
    """(x_0, noise) of what was predicted for x."""
    d = known.determinant
    return (known.q * x - known.sigma * out) / d, (known.alpha * out - known.p * x) / d


def tables(known):
    """`read` as tables: (x_0 of x, x_0 of out, noise of x, noise of out) for Coefficients (S,).

    Where d is 0, the one that the output does not determine is 0.
    """
    d = known.determinant
    rows = (known.q, -known.sigma, -known.p, known.alpha)
    limits = (0, known.p, 0, known.q)
    safe = np.where(d == 0, 1, d)
    return tuple(np.where(d == 0, y, x / safe) for x, y in zip(rows, limits, strict=True))


def look_up(tables, out, x, i):
    """(x_0, noise) by the `tables` at index i, () or (N,)."""
    x0_of_x, x0_of_out, noise_of_x, noise_of_out = (at(table, i, x) for table in tables)
    return x0_of_x * x + x0_of_out * out, noise_of_x * x + noise_of_out * out
