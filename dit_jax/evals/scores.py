"""Distances between images or distributions of images, computed from their features (N, D)."""

import numpy as np
import scipy.linalg


def frechet_distance(mean1, covariance1, mean2, covariance2):
    """Squared Frechet (Wasserstein-2) distance of two Gaussians (Dowson & Landau 1982), float.

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)); means (D,), covariances (D, D). The root's trace is
    computed from the symmetric C1^(1/2) C2 C1^(1/2), which stays real if a covariance is singular.
    """
    values, vectors = scipy.linalg.eigh(covariance1)
    root1 = vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T  # C1^(1/2)
    values = scipy.linalg.eigvalsh(root1 @ covariance2 @ root1)
    trace_of_root = np.sqrt(np.maximum(values, 0)).sum()
    distance = np.sum((mean1 - mean2) ** 2) + np.trace(covariance1) + np.trace(covariance2)
    return float(distance - 2 * trace_of_root)


def frechet_distance_of(x, y):
    """The Frechet distance of Gaussians fitted to two sets of features, (N, D) and (M, D)."""
    return frechet_distance(
        x.mean(axis=0), np.cov(x, rowvar=False), y.mean(axis=0), np.cov(y, rowvar=False)
    )


def nearest_distances(x, references):
    """Euclidean distances (N,) from rows of x (N, D) to the nearest of the references (M, D)."""
    squared = (x**2).sum(axis=1)[:, None] - 2 * x @ references.T + (references**2).sum(axis=1)
    return np.sqrt(np.maximum(squared.min(axis=1), 0))
