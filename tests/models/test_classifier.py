import jax
import numpy as np
import pytest

from dit_jax.machine import prng
from dit_jax.models import classifier


@pytest.mark.parametrize(
    "size, convs, shape",
    [  # of the layer of features
        ((8, 8, 1), 2, (4 * 4 * 64, 96)),  # enlarged to 16
        ((28, 28, 1), 2, (7 * 7 * 64, 96)),
        ((32, 24, 3), 3, (4 * 3 * 64, 96)),
        ((64, 64, 3), 4, (4 * 4 * 64, 96)),
        ((256, 256, 3), 4, (4 * 4 * 64, 96)),  # averaged to 64
    ],
)
def test_images_of_any_size_become_features_and_logits(size, convs, shape):
    config = classifier.ClassifierConfig(size, 5)
    params = jax.eval_shape(lambda: classifier.init(config, prng.key(0)))
    assert sum(name.startswith("conv") for name in params) == convs
    assert params["features"]["kernel"].shape == shape
    images = jax.ShapeDtypeStruct((2, *size), np.uint8)
    pool, logits = jax.eval_shape(classifier.make_apply(config), params, images)
    assert pool.shape == (2, 96) and logits.shape == (2, 5)
    assert pool.dtype == logits.dtype == np.float32


def test_small_images_are_repeated_and_large_ones_averaged():
    x = np.arange(64, dtype=np.float32).reshape(1, 8, 8, 1)
    repeated = classifier.resize(jax.numpy.asarray(x))
    np.testing.assert_array_equal(repeated, x.repeat(2, axis=1).repeat(2, axis=2))
    large = np.random.default_rng(0).normal(size=(1, 130, 70, 1)).astype(np.float32)
    averaged = classifier.resize(jax.numpy.asarray(large))
    assert averaged.shape == (1, 44, 24, 1)
    # the last row and column are of the pixels that are left; float32 sums
    np.testing.assert_allclose(averaged[0, 1, 1, 0], large[0, 2:5, 2:5, 0].mean(), rtol=1e-5)


def test_config_survives_json():
    config = classifier.ClassifierConfig((8, 8, 1), 5)
    fields = {"image_shape": [8, 8, 1], "num_classes": 5, "seed": 0}
    assert classifier.ClassifierConfig.from_json(fields) == config
