import numpy as np
import pytest

from dit_jax.errors import UserError
from dit_jax.evals import moments


def features(count=3000, size=5, offset=0.0):
    rng = np.random.default_rng(0)
    mix = rng.standard_normal((size, size))
    return (rng.standard_normal((count, size)) @ mix + offset).astype(np.float32)


def in_batches(x, size):
    return (x[i : i + size] for i in range(0, len(x), size))


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_moments_match_numpy(offset):
    x = features(offset=offset)
    found, exact = moments.of(x), x.astype(np.float64)
    assert found.count == 3000
    np.testing.assert_allclose(found.mean, exact.mean(axis=0), rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(found.covariance(), np.cov(exact, rowvar=False), rtol=1e-11)


@pytest.mark.parametrize("size", [1, 7, 64, 1024, 1500])
def test_batch_size_changes_no_bit(size):
    x = features()
    expected = moments.of(x)
    found = moments.of_batches(in_batches(x, size))
    assert found.count == expected.count
    np.testing.assert_array_equal(found.mean, expected.mean)
    np.testing.assert_array_equal(found.scatter, expected.scatter)


def test_order_changes_rounding_only():
    x = features(offset=100.0)
    a, b = moments.of(x), moments.of(x[np.random.default_rng(1).permutation(len(x))])
    np.testing.assert_allclose(b.mean, a.mean, rtol=1e-13)
    np.testing.assert_allclose(b.scatter, a.scatter, rtol=1e-11)


def test_merge_gives_the_moments_of_all_rows():
    x = features(500, offset=10.0)
    whole = moments.of(x)
    for cut in (1, 200, 499):
        merged = moments.merge(moments.of(x[:cut]), moments.of(x[cut:]))
        assert merged.count == 500
        np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-13)
        np.testing.assert_allclose(merged.scatter, whole.scatter, rtol=1e-11)


def test_too_few_samples_are_refused():
    with pytest.raises(UserError, match="moments need at least 1 sample, got 0"):
        moments.of_batches([])
    with pytest.raises(UserError, match="a covariance needs at least 2 samples, got 1"):
        moments.of(features(1)).covariance()
