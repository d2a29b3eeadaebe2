import jax
import numpy as np
import pytest
import random_run
from testdata import evaluation

from dit_jax.errors import UserError
from dit_jax.machine import sharding
from dit_jax.models import vae
from dit_jax.sampling import autoencoder, extractor


@pytest.mark.slow  # fast tests: evals/test_classifier.py, and cli/test_evaluate_images.py by index
def test_features_depend_neither_on_batch_size_nor_on_devices(
    inception_path, golden_eval, check_close
):
    """Bit for bit, also where a last chunk is filled up."""
    images = evaluation.images(64, 64, count=5)
    one = extractor.load(
        inception_path, mesh=sharding.make_mesh(devices=jax.devices()[:1]), per_device=1
    )
    eight = extractor.load(inception_path, per_device=1)
    expected = one(images)
    assert [x.shape for x in expected.values()] == [(5, 2048), (5, 2023), (5, 1008)]
    found = eight(images)
    parts = [eight(images[:2]), eight(images[2:])]
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name])
        joined = np.concatenate([part[name] for part in parts])
        np.testing.assert_array_equal(joined, expected[name])
    check_close("extractor", expected["pool"][:4], golden_eval["pool/64x64"], 1e-4)  # float32 sums


def test_checkpoint_says_what_was_converted(inception_path):
    assert extractor.describe(inception_path) == {"sha256": "abc", "published": True}
    assert len(extractor.read_digests(inception_path)) == 2 * 94 + 1


def test_wrong_use_is_refused(inception_path, tmp_path):
    config = vae.VAEConfig(channels=(8,), num_resnets=1, num_groups=4)
    autoencoder.save(tmp_path / "vae", config, random_run.weights(vae.init, config))
    for other in (tmp_path / "vae", tmp_path / "nothing"):
        with pytest.raises(UserError, match="inception must be a folder that `dit-convert incep"):
            extractor.load(other)
    look = extractor.load(inception_path)
    for images in (np.zeros((2, 8, 8, 1), np.uint8), np.zeros((2, 8, 8, 3), np.float32)):
        with pytest.raises(UserError, match=r"images must be uint8 \(N, H, W, 3\), got"):
            look(images)
    with pytest.raises(UserError, match="images must be at least 1, got 0"):
        look(np.zeros((0, 8, 8, 3), np.uint8))
