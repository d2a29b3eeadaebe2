import jax
import numpy as np
import pictures
import pytest
import random_run

from dit_jax.checkpoint import store
from dit_jax.data import digits, images
from dit_jax.errors import UserError
from dit_jax.evals import classifier, kernel, scores
from dit_jax.machine import sharding
from dit_jax.models import vae
from dit_jax.sampling import autoencoder


@pytest.fixture(scope="module")
def train():
    return digits.load()[0]


@pytest.fixture(scope="module")
def network(train):
    return classifier.fit(train.image, train.label, 10)


@pytest.fixture(scope="module")
def path(network, tmp_path_factory):
    path = tmp_path_factory.mktemp("classifier") / "kept"
    network.save(path)
    return path


def accuracy(network, arrays):
    return np.mean(network(arrays.image)["logits"].argmax(axis=1) == arrays.label)


def test_digits_are_recognised(network):
    _, held_out = digits.load()
    assert (network.about["num_train"], network.about["num_held_out"]) == (1350, 150)
    assert network.about["held_out_accuracy"] >= 0.97
    assert accuracy(network, held_out) >= 0.97


def test_distances_see_noise_and_missing_classes(network, train):
    """By the same number of images: held-out digits, noisy ones, and those of five classes."""
    _, held_out = digits.load()
    noise = np.random.default_rng(0).integers(-128, 128, held_out.image.shape)
    noisy = (held_out.image + noise).clip(0, 255).astype(np.uint8)
    few = train.image[train.label < 5][: len(held_out)]
    real = network(train.image)["pool"]
    assert np.mean(real.astype(np.float64) ** 2) == pytest.approx(1, rel=0.02)  # of a part of them
    for distance in (scores.frechet_distance_of, kernel.distance):
        near, *far = (distance(network(x)["pool"], real) for x in (held_out.image, noisy, few))
        assert min(far) > 4 * near, (distance, near, far)


@pytest.mark.slow
def test_drawn_shapes_are_recognised():
    rng = np.random.default_rng(3)
    names, label = list(pictures.SHAPES), np.arange(300) % 3
    drawn = [pictures.draw_shape(rng, names[y], pictures.SHAPES[names[y]]) for y in label]
    image = np.stack([images.center_crop(each, 32) for each in drawn])
    found = classifier.fit(image[:240], label[:240], 3)
    assert np.mean(found(image[240:])["logits"].argmax(axis=1) == label[240:]) >= 0.98


def test_features_depend_neither_on_batch_size_nor_on_devices(network, path):
    image = np.random.default_rng(0).integers(0, 256, (70, 8, 8, 1), np.uint8)
    one = classifier.load(path, mesh=sharding.make_mesh(devices=jax.devices()[:1]))
    expected = network(image)
    assert {name: x.shape for name, x in expected.items()} == {"pool": (70, 96), "logits": (70, 10)}
    parts = [one(image[:3]), one(image[3:67]), one(image[67:])]
    # XLA of jax 0.7 sums in another order for another number of images on a device.
    rtol = 0 if jax.__version_info__ >= (0, 8) else 1e-5
    for name, x in expected.items():
        assert x.dtype == np.float32
        np.testing.assert_allclose(one(image)[name], x, rtol=rtol, atol=rtol)
        np.testing.assert_allclose(
            np.concatenate([part[name] for part in parts]), x, rtol=rtol, atol=rtol
        )


def test_a_fit_repeats_and_its_identity_names_weights_and_data(train, network, path, monkeypatch):
    monkeypatch.setattr(classifier, "NUM_STEPS", (40, 40))
    first, again, other = (
        classifier.fit(train.image[:300], train.label[:300], 10, seed=seed) for seed in (0, 0, 1)
    )
    assert first.identity == again.identity
    assert first.identity["digest"] != other.identity["digest"]
    assert first.identity["data_sha256"] == other.identity["data_sha256"]
    assert first.identity["network"] == "classifier" and not first.published
    assert network.identity["data_sha256"] == train.sha256
    assert classifier.load(path).identity == network.identity


def test_a_damaged_or_another_checkpoint_is_refused(network, tmp_path):
    network.save(tmp_path / "kept")
    file = max((tmp_path / "kept/0/params").rglob("*"), key=lambda each: each.stat().st_size)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(store.Damaged):
        classifier.load(tmp_path / "kept")
    config = vae.VAEConfig(channels=(8,), num_resnets=1, num_groups=4)
    autoencoder.save(tmp_path / "vae", config, random_run.weights(vae.init, config))
    with pytest.raises(UserError, match="checkpoint must be one of a classifier, got"):
        classifier.load(tmp_path / "vae")


@pytest.mark.parametrize(
    "image, label, num_classes, message",
    [
        (np.zeros((2, 8, 8), np.uint8), [0, 1], 2, r"images must be uint8 \(N, H, W, C\), got ui"),
        (np.zeros((2, 8, 8, 1)), [0, 1], 2, r"images must be uint8 \(N, H, W, C\), got float64"),
        (np.zeros((1, 8, 8, 1), np.uint8), [0], 2, "images must be at least 2 for a classifier"),
        (np.zeros((2, 8, 8, 1), np.uint8), [0, 0], 1, "num_classes must be at least 2 for a cla"),
        (np.zeros((2, 8, 8, 1), np.uint8), [0], 2, "labels must be a whole number for each of 2"),
        (np.zeros((2, 8, 8, 1), np.uint8), [0.0, 1.0], 2, "labels must be a whole number for ea"),
        (np.zeros((2, 8, 8, 1), np.uint8), [0, 2], 2, r"labels must be in 0 .. 1, got 0 .. 2"),
    ],
)
def test_wrong_use_is_refused(image, label, num_classes, message):
    with pytest.raises(UserError, match=message):
        classifier.fit(image, label, num_classes)


def test_images_of_another_shape_are_refused(network):
    with pytest.raises(UserError, match=r"images must be uint8 \(N, 8, 8, 1\), got uint8 \(2, 16"):
        network(np.zeros((2, 16, 16, 1), np.uint8))
