import dataclasses

import jax
import latent_cache
import numpy as np
import pictures
import pytest

from configs import digits as digits_config
from configs import folder, imagenet256
from dit_jax.data import digits, feed, imagefolder, prepare
from dit_jax.errors import UserError
from dit_jax.evals import training_images
from dit_jax.machine import sharding
from dit_jax.models import vae
from dit_jax.runs import build
from dit_jax.sampling import autoencoder

TINY = vae.VAEConfig(latent_channels=1, channels=(8, 8), num_resnets=1, num_groups=4, scale=(2.0,))


def change(settings, topic, **fields):
    return dataclasses.replace(
        settings, **{topic: dataclasses.replace(getattr(settings, topic), **fields)}
    )


@pytest.fixture
def of_digits():
    return build.read(digits_config.get_config())


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A data set with the splits train, of 18 pictures, and val, of 9."""
    path = tmp_path_factory.mktemp("prepared")
    pictures.draw(path / "train")
    pictures.draw(path / "val", per_class=3)
    for split in ("train", "val"):
        prepare.write(path / "data", split, imagefolder.scan(path / split))
    return path / "data"


def test_images_come_in_a_random_order_that_the_seed_fixes(of_digits):
    train, _ = digits.load()
    drawn = training_images.draw(of_digits, 40)
    assert drawn.image.shape == (40, 8, 8, 1) and drawn.image.dtype == np.uint8
    assert drawn.label.dtype == np.int32 and drawn.class_names == train.class_names
    assert len(set(drawn.label.tolist())) == 10  # not the first of a sorted set
    more = training_images.draw(of_digits, 5000)
    assert len(more) == 1500
    np.testing.assert_array_equal(more.image[:40], drawn.image)
    other = training_images.draw(of_digits, 40, seed=1)
    assert not np.array_equal(other.image, drawn.image)
    order = np.random.default_rng(0).permutation(1500)
    np.testing.assert_array_equal(more.image, train.image[order])
    np.testing.assert_array_equal(more.label, train.label[order])


def test_labels_of_some_classes_are_those_of_the_model(of_digits):
    settings = change(of_digits, "data", classes=(7, 3))
    settings = change(settings, "model", num_classes=2)
    drawn = training_images.draw(settings, 50)
    assert set(drawn.label.tolist()) == {0, 1} and drawn.class_names == ("7", "3")
    rest = training_images.held_out(settings, 10_000)
    _, held_out = digits.load((7, 3))
    assert rest.class_names == ("7", "3") and len(rest) == len(held_out)
    assert sorted(rest.label.tolist()) == sorted(held_out.label.tolist())


def test_pictures_are_cropped_and_never_flipped(prepared):
    config = folder.get_config(str(prepared))
    config.data.flip = True
    config.model.input_size = (16, 16)
    settings = build.read(config)
    drawn, source = training_images.draw(settings, 18), feed.make(settings).source
    order = np.random.default_rng(0).permutation(18)
    for image, label, i in zip(drawn.image, drawn.label, order, strict=True):
        np.testing.assert_array_equal(image, source[i]["image"])
        assert label == source[i]["label"]
    rest = training_images.held_out(settings, 5)
    assert rest.image.shape == (5, 16, 16, 3)
    assert training_images.held_out(change(settings, "data", split="val"), 5) is None


def test_latents_are_decoded_without_noise(tmp_path, of_digits):
    path = latent_cache.write(tmp_path / "cache")
    settings = change(of_digits, "data", source="latents", space="latents", path=str(path))
    fed = feed.make(settings)
    with pytest.raises(UserError, match="data.vae must be given to compare images: what `dit-con"):
        training_images.draw(settings, 5, fed=fed)
    params = jax.jit(vae.init, static_argnums=0)(TINY, jax.random.key(0))
    decoder = autoencoder.Autoencoder(TINY, params, sharding.make_mesh())
    drawn = training_images.draw(settings, 5, fed=fed._replace(decoder=decoder))
    assert drawn.image.shape == (5, 16, 16, 3) and drawn.class_names[3] == "class 3"
    order = np.random.default_rng(0).permutation(40)[:5]
    assert drawn.label.tolist() == [i % 10 for i in order]
    means = np.stack([fed.source[i]["moments"][0, ..., :1] for i in order])
    np.testing.assert_array_equal(drawn.image, decoder.decode(means))  # the cache's scale is 1
    assert training_images.held_out(settings, 5) is None


def test_random_data_are_images_if_they_are_pixels(of_digits):
    settings = change(of_digits, "data", source="synthetic")
    drawn = training_images.draw(settings, 6)
    assert drawn.image.shape == (6, 8, 8, 1) and drawn.image.dtype == np.uint8
    assert drawn.image.std() > 50 and drawn.class_names == ()
    assert training_images.held_out(settings, 6) is None
    config = imagenet256.get_config()
    config.data.source = "synthetic"
    with pytest.raises(UserError, match="data.vae must be given to compare images"):
        training_images.draw(build.read(config), 6)


def test_a_model_of_other_axes_than_two_has_no_images(of_digits):
    settings = change(of_digits, "data", source="synthetic")
    settings = change(settings, "model", input_size=(4, 8, 8))
    with pytest.raises(UserError, match=r"input_size must have 2 axes to compare images, got \(4,"):
        training_images.draw(settings, 6)
