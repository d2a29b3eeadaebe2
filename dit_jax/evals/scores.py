"""Frechet distance, Inception Score and distances to neighbours, from features of images.

Shapes: N, M images, D features, L logits. Arithmetic is float64.
"""

from typing import NamedTuple

import numpy as np
import scipy  # loads scipy.linalg and scipy.special on first use, for half a second

from dit_jax.errors import UserError
from dit_jax.evals import moments

SPLIT_SIZE = 5000  # images in a split of the Inception Score
NEGATIVE = 1e-4  # a smaller share of the largest eigenvalue is rounding, as of float32 files
SMALLEST, NUM_SIZES = 5000, 15  # images in the smallest subset of FID-infinity, and subsets


class Gaussian(NamedTuple):
    """A mean (D,) and a root (D, r) of the covariance, which is root @ root.T."""

    mean: np.ndarray
    root: np.ndarray


def gaussian(mean, covariance):
    """The Gaussian of a mean (D,) and a covariance (D, D), which may be singular."""
    mean, covariance = np.asarray(mean, np.float64), np.asarray(covariance, np.float64)
    if covariance.shape != 2 * mean.shape:
        raise UserError(
            f"covariance must be of the {len(mean)} features of the mean, got {covariance.shape}"
        )
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise UserError("mean and covariance must be finite, got NaN or infinity")
    if not np.allclose(covariance, covariance.T, rtol=0, atol=NEGATIVE * np.abs(covariance).max()):
        raise UserError("covariance must be symmetric, got one that is not")
    values, vectors = scipy.linalg.eigh(covariance)  # ascending
    if values[0] < -NEGATIVE * values[-1]:
        raise UserError(f"covariance must have no negative eigenvalue, got {values[0]:.3g}")
    # Eigenvalues that are 0 come out as rounding errors of both signs, whose roots would add up.
    noise = max(-values[0], np.finfo(np.float64).eps * values[-1])
    values = np.where(values > 2 * noise, values, 0)
    return Gaussian(mean, vectors * np.sqrt(values))


def gaussian_of(features):
    """The Gaussian fitted to features (N, D), without forming the covariance.

    Exact for any rank, but it needs N x D float64 numbers twice; `gaussian` of `moments.of_batches`
    does not.
    """
    check_count("features", features, 2)
    x = np.asarray(features, np.float64)
    mean = x.mean(axis=0)
    x = x - mean
    if len(x) > x.shape[1]:
        x = scipy.linalg.qr(x, mode="r", overwrite_a=True, check_finite=False)[0][: x.shape[1]]
    return Gaussian(mean, x.T / np.sqrt(len(features) - 1))


def distance(a, b):
    """Squared Frechet (Wasserstein-2) distance of two Gaussians (Dowson & Landau 1982), float.

    |m1 - m2|^2 + tr C1 + tr C2 - 2 tr (C1 C2)^(1/2). The last trace is the sum of the singular
    values of R1' R2, with C = R R'. Unlike a root of C1 C2, they keep all digits of a covariance
    that is singular or nearly so.
    """
    trace_of_root = scipy.linalg.svdvals(a.root.T @ b.root).sum()
    traces = np.sum(a.root**2) + np.sum(b.root**2)
    return max(float(np.sum((a.mean - b.mean) ** 2) + traces - 2 * trace_of_root), 0.0)


def frechet_distance(mean1, covariance1, mean2, covariance2):
    """The Frechet distance from means (D,) and covariances (D, D)."""
    return distance(gaussian(mean1, covariance1), gaussian(mean2, covariance2))


def frechet_distance_of(x, y):
    """The Frechet distance of Gaussians fitted to two sets of features, (N, D) and (M, D)."""
    return distance(gaussian_of(x), gaussian_of(y))


class Extrapolation(NamedTuple):
    """A score at N = infinity, and what it was extrapolated from."""

    value: float
    sizes: np.ndarray  # (S,) numbers of images
    distances: np.ndarray  # (S,)


def frechet_at_infinity(features, reference, *, seed=0, num_sizes=NUM_SIZES, smallest=SMALLEST):
    """The Frechet distance that infinitely many samples would have (Chong & Forsyth 2020).

    The distance of N samples is too large by about c / N: a line through the distances of random
    subsets of `num_sizes` sizes from `smallest` to N is followed to 1 / N = 0. features (N, D);
    reference: a Gaussian.
    """
    check_count("features", features, smallest + num_sizes)
    rng = np.random.default_rng(seed)
    sizes = np.linspace(smallest, len(features), num_sizes).astype(int)
    distances = []
    for size in sizes:
        subset = moments.of(features[rng.permutation(len(features))[:size]])
        distances.append(distance(gaussian(subset.mean, subset.covariance()), reference))
    _, value = np.polyfit(1 / sizes, distances, 1)
    return Extrapolation(float(value), sizes, np.array(distances))


def inception_scores(logits, *, split_size=SPLIT_SIZE):
    """The Inception Score (Salimans et al. 2016) of consecutive splits of logits (N, L): (S,).

    exp of the mean of KL(p || mean p). As ADM: images stay in their order, and a last split that
    is smaller counts as much as the others. The score of all is the mean.
    """
    check_count("logits", logits, 1)
    starts = range(0, len(logits), split_size)
    return np.array([_inception_score(logits[i : i + split_size]) for i in starts])


def _inception_score(logits):
    log_p = scipy.special.log_softmax(np.asarray(logits, np.float64), axis=1)
    p = np.exp(log_p)
    with np.errstate(divide="ignore", invalid="ignore"):
        kl = p * (log_p - np.log(p.mean(axis=0)))
    return np.exp(np.nansum(kl, axis=1).mean())  # a class without any p adds nothing


def order_ratio(logits, *, num_splits=10):
    """The Inception Score of consecutive splits over that of interleaved ones, float.

    About 1 for images in random order. Well below 1 if classes follow each other: then the
    Inception Score of consecutive splits is not comparable.
    """
    check_count("logits", logits, num_splits)
    consecutive = [_inception_score(x) for x in np.array_split(logits, num_splits)]
    interleaved = [_inception_score(logits[i::num_splits]) for i in range(num_splits)]
    return float(np.mean(consecutive) / np.mean(interleaved))


def nearest_distances(x, references):
    """Euclidean distances (N,) from rows of x (N, D) to the nearest of the references (M, D)."""
    squared = (x**2).sum(axis=1)[:, None] - 2 * x @ references.T + (references**2).sum(axis=1)
    return np.sqrt(np.maximum(squared.min(axis=1), 0))


def standard_deviation(score, *sets, resamples=100, seed=0):
    """The bootstrap standard deviation of score(*sets) -> float (Efron 1979), float.

    Each of the sets (N, ...) is drawn anew with replacement. Print it beside the score itself:
    resampling makes a Frechet distance larger, so the mean of the resampled scores is biased.
    """
    rng = np.random.default_rng(seed)
    scores = [
        score(*(x[rng.integers(len(x), size=len(x))] for x in sets)) for _ in range(resamples)
    ]
    return float(np.std(scores, ddof=1))


def check_count(name, x, least):
    """UserError if x has fewer rows than a score needs."""
    if len(x) < least:
        raise UserError(f"{name} must be of at least {least} images for this score, got {len(x)}")
