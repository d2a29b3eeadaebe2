from types import SimpleNamespace

import numpy as np
import pytest

from dit_jax.errors import UserError
from dit_jax.evals import reference

NETWORK = SimpleNamespace(identity={"network": "small"}, num_features=3, num_spatial=2)
GOOD = {"mu": np.zeros(3), "sigma": np.eye(3), "mu_s": np.zeros(2), "sigma_s": np.eye(2)}


def open_it(tmp_path, **arrays):
    np.savez(tmp_path / "r.npz", **arrays)
    return reference.open_adm(tmp_path / "r.npz", NETWORK, tmp_path / "features", (8, 8, 3))


def test_moments_alone_are_a_reference(tmp_path):
    found = open_it(tmp_path, **GOOD)
    assert found.images is None and found.identity["images"] == 0
    np.testing.assert_allclose(found.pool.root @ found.pool.root.T, np.eye(3))
    assert len(found.spatial.mean) == 2


@pytest.mark.parametrize(
    "change, message",
    [
        ({"mu": np.zeros(4)}, r"mu must be floats of shape (3,), got float64 (4,) in"),
        ({"mu": np.zeros((1, 3))}, r"mu must be floats of shape (3,), got float64 (1, 3) in"),
        ({"mu": np.zeros(3, int)}, r"mu must be floats of shape (3,), got int64 (3,) in"),
        ({"sigma": np.eye(2)}, r"sigma must be floats of shape (3, 3), got float64 (2, 2) in"),
        ({"sigma_s": np.eye(3)}, r"sigma_s must be floats of shape (2, 2), got float64 (3, 3) in"),
        ({"sigma": np.full((3, 3), np.nan)}, "r.npz: mean and covariance must be finite, got NaN"),
        ({"sigma": -np.eye(3)}, "r.npz: covariance must have no negative eigenvalue, got -1"),
        ({"sigma": np.tri(3)}, "r.npz: covariance must be symmetric, got one that is not"),
        ({"mu": np.array([{}] * 3)}, "reference must be an .npz without pickles, got"),
    ],
)
def test_wrong_moments_are_one_line_before_features_are_computed(tmp_path, change, message):
    images = np.zeros((8, 8, 8, 3), np.uint8)  # NETWORK cannot be called
    with pytest.raises(UserError) as error:
        open_it(tmp_path, arr_0=images, **(GOOD | change))
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "features").exists()
