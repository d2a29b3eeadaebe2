import jax
import numpy as np
import pytest

from dit_jax.diffusion import schedules
from dit_jax.machine import sharding
from dit_jax.models import dit, pixels
from dit_jax.sampling import generate

CONFIG = dit.configure("Ti", 4, input_size=(8, 8), in_channels=1, num_classes=10)
OPTIONS = {
    "space": "pixels",
    "sampler": "ddpm",
    "num_steps": 4,
    "eta": 0.0,
    "clip_x0": True,
    "cfg_scale": 2.0,
    "cfg_channels": 0,
    "cfg_interval": (0, 999),
}


def make(config=CONFIG, **options):
    return generate.make_sampler(
        dit.make_apply(config),
        config,
        schedules.linear(),
        sharding.make_mesh(),
        **OPTIONS | options,
    )


@pytest.fixture(scope="module")
def params():
    key = jax.random.key(0)
    params = dit.init(CONFIG, key)
    return jax.tree.map(lambda x: x + 0.05 * jax.random.normal(key, x.shape), params)


@pytest.fixture(scope="module")
def draw():
    return make()


COMPILED = []  # one entry for every program that XLA compiles in this session


def listen(event, duration, **_):
    if event == "/jax/core/compile/backend_compile_duration":
        COMPILED.append(event)


jax.monitoring.register_event_duration_secs_listener(listen)


def count_compilations(function):
    """How many programs XLA compiles while function() runs."""
    before = len(COMPILED)
    function()
    return len(COMPILED) - before


def test_a_thousand_images_compile_once_and_the_next_thousand_nothing(params):
    draw, labels = make(), np.arange(1000) % 10

    def run():
        images = generate.draw_all(draw, params, labels, seed=0, batch_size=256)
        assert images.shape == (1000, 8, 8, 1) and images.dtype == np.uint8

    run_before = draw._cache_size()
    first = count_compilations(run)
    assert draw._cache_size() - run_before == 1
    assert first >= 1  # the sampler and the keys
    assert count_compilations(run) == 0


def test_an_image_does_not_depend_on_its_batch(params, draw):
    labels = np.arange(20) % 10
    small = generate.draw_all(draw, params, labels, seed=0, batch_size=8)
    large = generate.draw_all(draw, params, labels, seed=0, batch_size=24)
    few = generate.draw_all(draw, params, labels[:3], seed=0, batch_size=8)
    # float32 sums may differ in the last bit, which rounding to a pixel can turn into 1
    np.testing.assert_allclose(small.astype(int), large, atol=1)
    np.testing.assert_allclose(small[:3].astype(int), few, atol=1)
    other = generate.draw_all(draw, params, labels, seed=1, batch_size=8)
    assert np.abs(other.astype(int) - small).mean() > 10


def test_one_device_draws_what_eight_draw(params, draw):
    labels = np.arange(8)
    eight = generate.draw_all(draw, params, labels, seed=0, batch_size=8)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    alone = generate.make_sampler(
        dit.make_apply(CONFIG), CONFIG, schedules.linear(), mesh, **OPTIONS
    )
    one = generate.draw_all(alone, jax.device_get(params), labels, seed=0, batch_size=8)
    np.testing.assert_allclose(eight.astype(int), one, atol=1)


def test_latents_stay_latents(params):
    latents = generate.draw_all(make(space="latents"), params, [1, 2], seed=0, batch_size=8)
    assert latents.dtype == np.float32 and latents.shape == (2, 8, 8, 1)
    images = generate.draw_all(make(), params, [1, 2], seed=0, batch_size=8)
    np.testing.assert_array_equal(np.asarray(pixels.to_uint8(latents)), images)


@pytest.mark.parametrize(
    "options", [{"sampler": "ddim"}, {"sampler": "ddim", "eta": 1.0}, {"cfg_scale": 1.0}]
)
def test_every_option_reaches_the_samples(params, draw, options):
    usual = generate.draw_all(draw, params, [1, 2], seed=0, batch_size=8)
    changed = generate.draw_all(make(**options), params, [1, 2], seed=0, batch_size=8)
    assert not np.array_equal(usual, changed)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"sampler": "euler"}, "sampler must be one of ddpm, ddim, got 'euler'"),
        ({"space": "cells"}, "space must be one of pixels, latents, got 'cells'"),
        ({"eta": 2.0}, "eta must be in 0 .. 1, got 2.0"),
        ({"eta": 0.5}, "eta must be 0 for ddpm, which has none, got 0.5"),
        ({"eta": float("nan")}, "eta must be a finite number, got nan"),
        ({"cfg_scale": float("inf")}, "cfg_scale must be a finite number, got inf"),
        ({"cfg_channels": 0.5}, "cfg_channels must be in 0 .. 1, got 0.5"),
        ({"cfg_interval": 5}, "cfg_interval must be two whole numbers, got 5"),
        ({"cfg_interval": (0.0, 5)}, r"cfg_interval must be two whole numbers, got \(0.0, 5\)"),
        ({"cfg_scale": -1.0}, "cfg_scale must be 0 or more, got -1.0"),
        ({"cfg_channels": 2}, "cfg_channels must be in 0 .. 1, got 2"),
        ({"cfg_interval": (5, 1000)}, r"first, last in 0 .. 999, got \(5, 1000\)"),
        ({"num_steps": 0}, "num_steps must be in 2 .. 1000, got '0'"),
        ({"num_steps": -3}, "num_steps must be a number"),
    ],
)
def test_options_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_guidance_needs_a_null_label():
    config = CONFIG._replace(null_label=False)
    with pytest.raises(ValueError, match="cfg_scale must be 1 for a model without a null label"):
        make(config)


def test_a_grid_shows_every_image_in_its_place():
    images = np.arange(1, 6, dtype=np.uint8).reshape(5, 1, 1, 1) * np.ones((1, 2, 3, 1), np.uint8)
    picture = np.asarray(generate.grid(images, columns=2, scale=2))
    assert picture.shape == (3 * 4 + 2 * 2, 2 * 6 + 2)  # three rows of two, lines of 2 between
    assert picture[0, 0] == 1 and picture[0, 8] == 2 and picture[6, 0] == 3 and picture[12, 0] == 5
    assert picture[4, 0] == picture[12, 8] == generate.GREY  # a line; no sixth image
    assert np.asarray(generate.grid(np.zeros((4, 8, 8, 3), np.uint8))).shape == (18, 18, 3)
    assert np.asarray(generate.grid(images, columns=9)).shape == (2, 5 * 3 + 4 * 2)  # one full row
