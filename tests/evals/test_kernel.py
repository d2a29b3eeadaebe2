import numpy as np
import pytest
from testdata import evaluation

from dit_jax.errors import UserError
from dit_jax.evals import kernel


@pytest.mark.parametrize("name", ["full", "singular", "singular_full", "same", "flat", "shifted"])
def test_distance_over_all_pairs_is_exact(golden_eval, name):
    real, fake = evaluation.frechet_sets()[name]
    expected = float(golden_eval[f"kid/{name}/exact"])
    assert kernel.distance(real, fake) == pytest.approx(expected, rel=1e-12, abs=1e-13)


def test_distance_of_nearly_singular_features_is_exact(golden_eval):
    real, fake = evaluation.frechet_sets()["near_singular"]
    expected = float(golden_eval["kid/near_singular/exact"])
    assert kernel.distance(real, fake) == pytest.approx(expected, rel=1e-12)


def test_subsets_are_those_of_torch_fidelity(golden_eval):
    real, fake = evaluation.frechet_sets()["full"]
    found = kernel.distances(fake, real, num_subsets=10, size=200)
    expected = golden_eval["kid/full/torch_fidelity_10x200"]
    # torch-fidelity multiplies in float32.
    np.testing.assert_allclose([found.mean(), found.std()], expected, rtol=1e-5)


def test_blocks_change_rounding_only(monkeypatch):
    real, fake = evaluation.frechet_sets()["full"]
    whole = kernel.distance(real, fake)
    monkeypatch.setattr(kernel, "BLOCK", 37)
    assert kernel.distance(real, fake) == pytest.approx(whole, rel=1e-12)


def test_distance_is_unbiased_for_few_samples():
    """The mean over many draws from one distribution is 0, also with 4 samples each."""
    x = np.random.default_rng(0).standard_normal((2000, 2, 4, 3))
    found = [kernel.distance(a, b) for a, b in x]
    assert abs(np.mean(found)) < 4 * np.std(found) / np.sqrt(len(found))


def test_too_few_samples_are_refused():
    x = np.zeros((3, 2))
    with pytest.raises(UserError, match="features must be of at least 2 images .*, got 1"):
        kernel.distance(x, x[:1])
    with pytest.raises(UserError, match="reference must be of at least 3 images .*, got 2"):
        kernel.distances(x, x[:2], size=3)
