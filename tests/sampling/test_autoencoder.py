import jax
import numpy as np
import pytest

from dit_jax.checkpoint import store
from dit_jax.machine import sharding
from dit_jax.models import vae
from dit_jax.sampling import autoencoder

CONFIG = vae.VAEConfig(channels=(8, 16), num_resnets=1, num_groups=4, scale=(0.5,), shift=(0.1,))


def random_params(config=CONFIG):
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: vae.init(config, jax.random.key(0)))
    return jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32) * 0.2, shapes)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("vae") / "vae"
    autoencoder.save(path, CONFIG, random_params())
    return path


@pytest.fixture(scope="module")
def model(saved):
    return autoencoder.load(saved)


def test_it_opens_as_it_was_saved(model):
    assert model.config == CONFIG
    jax.tree.map(np.testing.assert_array_equal, model.params, random_params())
    assert repr(model).startswith("Autoencoder(2x smaller, 4 channels, scale (0.5,)")


def test_images_become_moments_and_latents_images(model):
    images = np.random.default_rng(1).integers(0, 256, (3, 8, 12, 3), np.uint8)
    moments = model.encode(images)
    encode, decode = map(jax.jit, vae.make_apply(CONFIG))
    expected = encode(model.params, images.astype(np.float32) / 127.5 - 1)
    assert moments.shape == (3, 4, 6, 8)
    np.testing.assert_allclose(moments, expected, atol=1e-4 * np.abs(expected).max())
    latents = np.random.default_rng(1).standard_normal((3, 4, 6, 4), np.float32)
    decoded = decode(model.params, latents / 0.5 + 0.1)
    actual = model.decode(latents)
    assert actual.dtype == np.uint8 and actual.shape == (3, 8, 12, 3)
    expected = np.clip(np.round(decoded * 127.5 + 127.5), 0, 255)
    np.testing.assert_allclose(actual.astype(int), expected, atol=1)  # the last bit of a float


def test_chunks_change_nothing(model, monkeypatch):
    latents = np.random.default_rng(2).standard_normal((21, 4, 4, 4), np.float32)
    at_once = model.decode(latents)
    monkeypatch.setattr(autoencoder, "PIXELS", 64)  # one image a device
    in_chunks = model.decode(latents)
    assert len(in_chunks) == 21
    np.testing.assert_allclose(in_chunks.astype(int), at_once, atol=1)


def test_what_does_not_fit_is_named(model, tmp_path):
    with pytest.raises(ValueError, match="vae must have 3 latent channels, got 4"):
        model.decode(np.zeros((1, 4, 4, 3), np.float32))
    with pytest.raises(ValueError, match="images must be divisible by 2, got 8 x 7"):
        model.encode(np.zeros((1, 8, 7, 3), np.uint8))
    with store.open_writer(background=False) as writer:
        store.save(writer, tmp_path, 0, {"params": {"a": np.zeros(2)}}, {"model": {}})
    with pytest.raises(ValueError, match="vae must be a folder that .* wrote, got"):
        autoencoder.load(tmp_path)
    with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16, got 'half'"):
        autoencoder.Autoencoder(CONFIG, {}, sharding.make_mesh(), dtype="half")
