"""Precision, recall, density and coverage: is an image within reach of the other set's images?

Kynkaanniemi et al. 2019, https://arxiv.org/abs/1904.06991, and Naeem et al. 2020,
https://arxiv.org/abs/2002.09797. An image reaches as far as its k-th nearest neighbour in its own
set. Distances are squared and are computed in blocks, as ADM's evaluator does.
Shapes: N reference images, M samples, D features.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.evals.scores import check_count

K = 3  # of precision and recall
DENSITY_K = 5  # of density and coverage
BLOCK = 10_000  # rows and columns; ADM chooses the arithmetic for each block
STRIP = 1_000  # rows of a block that are in memory at a time
ARITHMETICS = ("float16", "float32")
LARGEST_HALF = 65504


class Membership(NamedTuple):
    """One value for each image; the score of a set is the mean."""

    precision: np.ndarray  # (M,) bool: the sample is within reach of a reference image
    recall: np.ndarray  # (N,) bool: the reference image is within reach of a sample
    density: np.ndarray  # (M,) float64: number of reference images that reach the sample, over k
    coverage: np.ndarray  # (N,) bool: the reference image reaches a sample


def compare(reference, samples, *, arithmetic="float32"):
    """The Membership of features (N, D) of reference images and (M, D) of samples.

    arithmetic: "float32", or "float16" as in ADM and in papers that print its numbers. Distances
    of pool_3 are then rounded to multiples of 0.5, and ties put more images within reach.
    Precision and recall count a distance equal to the reach, density and coverage do not.
    """
    if arithmetic not in ARITHMETICS:
        raise ValueError(f"arithmetic must be one of {ARITHMETICS}, got {arithmetic!r}")
    reach, far_reach = radii(reference, (K, DENSITY_K), arithmetic=arithmetic)
    (reach_of_samples,) = radii(samples, (K,), arithmetic=arithmetic)
    n, m = len(reference), len(samples)
    precision, recall, coverage = (np.zeros(size, bool) for size in (m, n, n))
    count = np.zeros(m)
    for rows, columns, distances in _strips(reference, samples, arithmetic):
        precision[columns] |= (distances <= reach[rows, None]).any(axis=0)
        recall[rows] |= (distances <= reach_of_samples[columns]).any(axis=1)
        reached = distances < far_reach[rows, None]
        count[columns] += reached.sum(axis=0)
        coverage[rows] |= reached.any(axis=1)
    return Membership(precision, recall, count / DENSITY_K, coverage)


def radii(x, ks, *, arithmetic="float32"):
    """Squared distances to the k-th nearest of the same set, for each k: (len(ks), N) float32.

    The 0-th nearest is the image itself.
    """
    count = max(ks) + 1
    check_count("features", x, count)
    nearest = np.full((len(x), count), np.inf, np.float32)
    for rows, _, distances in _strips(x, x, arithmetic):
        smallest = np.partition(distances, min(count, distances.shape[1]) - 1)[:, :count]
        nearest[rows] = np.sort(np.concatenate([nearest[rows], smallest], axis=1))[:, :count]
    return nearest[:, list(ks)].T


def _strips(x, y, arithmetic):
    """Yields (rows, columns, distances): slices that cover x and y, and float32 (rows, columns)."""
    x, y = (np.asarray(features, np.float32) for features in (x, y))
    for top in range(0, len(x), BLOCK):
        for left in range(0, len(y), BLOCK):
            a, b = x[top : top + BLOCK], jnp.asarray(y[left : left + BLOCK])
            half = arithmetic == "float16" and _is_finite_in_half(a, b)
            columns = slice(left, left + len(b))
            for start in range(0, len(a), STRIP):
                distances = np.asarray(_distances(a[start : start + STRIP], b, half=half))
                yield slice(top + start, top + start + len(distances)), columns, distances


def _is_finite_in_half(a, b):
    """False if ADM's evaluator would repeat the block in float32."""
    lengths = [float(jnp.linalg.norm(x, axis=1).max()) for x in (a, b)]
    if sum(lengths) ** 2 < LARGEST_HALF / 2:  # no term of a distance can be larger
        return True
    strips = (a[start : start + STRIP] for start in range(0, len(a), STRIP))
    return all(bool(jnp.isfinite(_distances(strip, b, half=True)).all()) for strip in strips)


@functools.partial(jax.jit, static_argnames="half")
def _distances(u, v, *, half):
    """|u|^2 - 2 u.v + |v|^2, of rows of u (n, D) and v (m, D), at least 0: float32 (n, m).

    half: rounds every term to float16, in TensorFlow's order; sums of products are in float32.
    """

    def rounded(x):
        return jax.lax.reduce_precision(x, exponent_bits=5, mantissa_bits=10) if half else x

    u, v = rounded(u), rounded(v)
    u_squared, v_squared = (rounded(jnp.square(x).sum(axis=1)) for x in (u, v))
    products = rounded(jnp.dot(u, v.T, precision="highest"))  # (n, m)
    difference = rounded(u_squared[:, None] - rounded(2 * products))
    return jnp.maximum(rounded(difference + v_squared[None, :]), 0)
