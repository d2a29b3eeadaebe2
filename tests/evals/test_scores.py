import numpy as np
import pytest
import scipy.linalg

from dit_jax.evals import scores


def random_gaussian(seed, size=6):
    rng = np.random.default_rng(seed)
    factor = rng.standard_normal((size, size))
    return rng.standard_normal(size), factor @ factor.T


def test_frechet_distance_of_equal_gaussians_is_zero():
    mean, covariance = random_gaussian(0)
    assert scores.frechet_distance(mean, covariance, mean, covariance) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_in_one_dimension_matches_the_formula():
    distance = scores.frechet_distance(
        np.array([1.0]), np.array([[4.0]]), np.array([3.0]), np.array([[9.0]])
    )
    assert distance == pytest.approx((1 - 3) ** 2 + (2 - 3) ** 2)


def test_frechet_distance_matches_the_matrix_root_and_is_symmetric():
    (m1, c1), (m2, c2) = random_gaussian(1), random_gaussian(2)
    root = scipy.linalg.sqrtm(c1 @ c2)
    expected = np.sum((m1 - m2) ** 2) + np.trace(c1 + c2 - 2 * root).real
    assert scores.frechet_distance(m1, c1, m2, c2) == pytest.approx(expected, rel=1e-9)
    assert scores.frechet_distance(m2, c2, m1, c1) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_of_singular_covariances_is_real():
    c1, c2 = np.diag([1.0, 4.0, 0.0]), np.diag([9.0, 0.0, 0.0])
    distance = scores.frechet_distance(np.zeros(3), c1, np.zeros(3), c2)
    assert distance == pytest.approx((1 - 3) ** 2 + 4)


def test_frechet_distance_of_samples_estimates_the_distance_of_their_gaussians():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((50_000, 3))
    y = 2 * rng.standard_normal((50_000, 3)) + 1
    assert scores.frechet_distance_of(x, y) == pytest.approx(3 * 1 + 3 * 1, rel=0.03)


def test_nearest_distances():
    x = np.array([[0.0, 0.0], [3.0, 4.0], [10.0, 0.0]])
    references = np.array([[0.0, 0.0], [9.0, 0.0]])
    expected = [0, 5, 1]
    np.testing.assert_allclose(scores.nearest_distances(x, references), expected, atol=1e-9)
