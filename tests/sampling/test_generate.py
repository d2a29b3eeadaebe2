import dataclasses

import jax
import numpy as np
import pytest
import random_run
from modules import count_products

from dit_jax import settings
from dit_jax.diffusion import ddpm, flow, mean_flow, samplers, schedules, solvers
from dit_jax.diffusion.process import Prediction, timed
from dit_jax.errors import UserError
from dit_jax.machine import sharding
from dit_jax.models import dit, pixels
from dit_jax.sampling import generate

SMALL = {"input_size": (8, 8), "in_channels": 1, "num_classes": 10}
CONFIG = dit.configure("Ti", 4, **SMALL)
PROCESS = ddpm.DDPM(schedules.linear())
SAMPLING = settings.Sampling(num_steps="4", clip_x0=True, cfg_scale=2.0, cfg_channels=0)


def make(config=CONFIG, *, space="pixels", mesh=None, **options):
    sampling = dataclasses.replace(SAMPLING, **options)
    mesh = mesh or sharding.make_mesh()
    apply = dit.make_apply(config)
    return generate.make(apply, config, PROCESS, mesh, space=space, sampling=sampling)


@pytest.fixture(scope="module")
def params():
    return random_run.draw(CONFIG)[0]


@pytest.fixture(scope="module")
def usual():
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
    fresh, labels = make(), np.arange(1000) % 10

    def run():
        images = generate.run(fresh, params, labels, seed=0, batch_size=256)
        assert images.shape == (1000, 8, 8, 1) and images.dtype == np.uint8

    run_before = fresh._cache_size()
    first = count_compilations(run)
    assert fresh._cache_size() - run_before == 1
    assert first >= 1  # the sampler and the keys
    assert count_compilations(run) == 0


def test_batches_are_timed_after_one_compilation():
    def run(times, seconds):
        made = jax.jit(lambda params, given: (times * given["labels"], given["labels"] >= 0))
        return generate.run(made, {}, np.arange(20), seed=0, batch_size=8, seconds=seconds)

    run(1, None)  # compiles the keys
    seconds = []
    assert count_compilations(lambda: run(2, None)) == count_compilations(lambda: run(3, seconds))
    assert len(seconds) == 3 and min(seconds) > 0


def test_an_image_does_not_depend_on_its_batch(params, usual):
    labels = np.arange(20) % 10
    small = generate.run(usual, params, labels, seed=0, batch_size=8)
    large = generate.run(usual, params, labels, seed=0, batch_size=24)
    few = generate.run(usual, params, labels[:3], seed=0, batch_size=8)
    # float32 sums may differ in the last bit, which rounding to a pixel can turn into 1
    np.testing.assert_allclose(small.astype(int), large, atol=1)
    np.testing.assert_allclose(small[:3].astype(int), few, atol=1)
    other = generate.run(usual, params, labels, seed=1, batch_size=8)
    assert np.abs(other.astype(int) - small).mean() > 10


def test_images_can_be_drawn_in_parts(params, usual):
    labels = np.arange(16) % 10
    whole = generate.run(usual, params, labels, seed=0, batch_size=8)
    part = generate.run(usual, params, labels[8:], seed=0, first=8, batch_size=8)
    np.testing.assert_array_equal(part, whole[8:])


def test_labels_are_drawn_by_index():
    labels = generate.random_labels(0, 0, 5000, 10)
    np.testing.assert_array_equal(generate.random_labels(0, 700, 30, 10), labels[700:730])
    counts = np.bincount(labels, minlength=10)
    assert len(counts) == 10 and counts.min() > 420 and counts.max() < 580  # 500 +- 21
    assert (generate.random_labels(1, 0, 5000, 10) == labels).mean() < 0.15


@pytest.mark.parametrize("tokens, count", [(16, 256), (256, 16), (1024, 8), (4, 256)])
def test_devices_draw_about_the_same_number_of_tokens(tokens, count):
    side = 2 * int(tokens**0.5)
    config = dit.configure("Ti", 2, input_size=(side, side), in_channels=1, num_classes=10)
    assert generate.images_at_once(config) == count


def test_one_device_draws_what_eight_draw(params, usual):
    labels = np.arange(8)
    eight = generate.run(usual, params, labels, seed=0, batch_size=8)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    one = generate.run(make(mesh=mesh), jax.device_get(params), labels, seed=0, batch_size=8)
    np.testing.assert_allclose(eight.astype(int), one, atol=1)


def test_latents_stay_latents(params):
    latents = generate.run(make(space="latents"), params, [1, 2], seed=0, batch_size=8)
    assert latents.dtype == np.float32 and latents.shape == (2, 8, 8, 1)
    images = generate.run(make(), params, [1, 2], seed=0, batch_size=8)
    np.testing.assert_array_equal(np.asarray(pixels.to_uint8(latents)), images)


@pytest.mark.parametrize(
    "options", [{"sampler": "ddim"}, {"sampler": "ddim", "eta": 1.0}, {"cfg_scale": 1.0}]
)
def test_every_option_reaches_the_samples(params, usual, options):
    images = generate.run(usual, params, [1, 2], seed=0, batch_size=8)
    changed = generate.run(make(**options), params, [1, 2], seed=0, batch_size=8)
    assert not np.array_equal(images, changed)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"eta": 0.5}, "eta must be left at 0 for ddpm, which does not use it, got 0.5"),
        ({"cfg_interval": (-1, 5)}, r"first <= last in 0 .. 999, got \(-1, 5\)"),
        ({"cfg_channels": 2}, "cfg_channels must be in 0 .. 1, got 2"),
        ({"cfg_interval": (5, 1000)}, r"first <= last in 0 .. 999, got \(5, 1000\)"),
        (
            {"cfg_interval": (0.1, 0.9), "cfg_scale": 2.0},
            "cfg_interval must hold the time of a step, 999 .. 0, unless cfg_scale is 1, got",
        ),
        ({"num_steps": "0"}, "num_steps must be in 2 .. 1000, got '0'"),
        ({"num_steps": "-3"}, "num_steps must be a whole number"),
    ],
)
def test_options_out_of_range_are_named(options, message):
    with pytest.raises(UserError, match=message):
        make(**options)


def test_guidance_needs_a_null_label():
    config = CONFIG._replace(null_label=False)
    with pytest.raises(UserError, match="cfg_scale must be 1 for a model without a null label"):
        make(config)


@pytest.mark.parametrize(
    "options, calls, passes",
    [
        ({}, 4, 8),
        ({"cfg_scale": 1.0}, 4, 4),
        ({"cfg_interval": (300, 999)}, 4, 7),
        ({"sampler": "heun", "cfg_interval": (300, 999)}, 7, 13),
        ({"sampler": "unipc", "cfg_schedule": "linear"}, 4, 7),
        ({"num_steps": "999,500,1"}, 3, 6),
    ],
)
def test_a_guided_step_costs_two_passes(options, calls, passes):
    """The four steps are 0, 333, 666 and 999."""
    sampling = dataclasses.replace(SAMPLING, **options)
    assert generate.count_calls(PROCESS, sampling) == calls
    assert generate.count_passes(PROCESS, sampling) == passes


@pytest.mark.parametrize("sampler", ["dpm2m", "unipc"])
def test_multistep_samplers_start_anew_where_guidance_begins_and_ends(sampler):
    options = {"sampler": sampler, "num_steps": "5", "cfg_interval": (300, 790)}
    plan = generate.make_plan(PROCESS, dataclasses.replace(SAMPLING, **options))
    np.testing.assert_array_equal(plan.scales, [1, 1, 2, 2, 1])  # t = 999, 799, 599, 399, 199

    def predict(x, i):
        return Prediction(np.float32(0.5) * x**2 - x, None)

    def sample(sampler):
        return samplers.run(sampler, predict, np.linspace(-1, 1, 6, dtype=np.float32)[:, None])

    restarts = np.array([False, False, True, False, True])
    expected = sample(solvers.SAMPLERS[sampler](plan.levels, restarts=restarts))
    np.testing.assert_array_equal(sample(plan.sampler), expected)
    assert np.abs(expected - sample(solvers.SAMPLERS[sampler](plan.levels))).max() > 1e-4


@pytest.mark.parametrize(
    "options, times",
    [
        ({"sampler": "ddim"}, [999, 666, 333, 0]),
        ({"sampler": "dpm2m"}, [999, 749, 499, 249]),
        ({"sampler": "dpm2m", "spacing": "linspace"}, [999, 666, 333, 0]),
        ({"sampler": "unipc", "num_steps": "ddim4"}, [750, 500, 250, 0]),
        ({"sampler": "heun", "num_steps": "999,9"}, [999, 9]),
    ],
)
def test_a_sampler_has_a_spacing_of_its_own(options, times):
    levels = generate.make_levels(PROCESS, dataclasses.replace(SAMPLING, **options))
    assert levels.time[:-1].tolist() == times


def test_the_last_step_of_sde_is_that_of_its_option():
    path = flow.Flow("linear")
    for sampler, last, expected in [("sde", 0.04, 0.04), ("sde", 0.0, 0.25), ("ddim", 0.04, 0.25)]:
        options = {"sampler": sampler, "sde_last": last, "cfg_interval": (0, 1)}
        levels = generate.make_levels(path, dataclasses.replace(SAMPLING, **options))
        assert levels.time[-2] == expected and levels.num_steps == 4


def test_weights_go_from_class_to_class():
    weights = generate.interpolate([3, 1, 2], 5, 4)
    expected = [[0, 0, 0, 1], [0, 0.5, 0, 0.5], [0, 1, 0, 0], [0, 0.5, 0.5, 0], [0, 0, 1, 0]]
    np.testing.assert_allclose(weights, expected)
    np.testing.assert_allclose(generate.interpolate([3, 1], 1, 4), expected[:1])


JIT = {
    **{"norm": "rms", "mlp": "swiglu", "position": "rope", "qk_norm": True, "bottleneck": 7},
    **{"class_tokens": 5, "class_tokens_from": 3},
}
CONDITIONS = ("t", "h", "omega", "t_min", "t_max", "y")  # of improved MeanFlow
HEADS = {"conditions": CONDITIONS, "velocity_head": True}


@pytest.mark.parametrize(
    "process, model, options",
    [
        (PROCESS, {}, {"cfg_scale": 1.0}),
        (PROCESS, {"learn_sigma": True}, {"num_steps": "3"}),
        (flow.Flow("linear"), JIT, {"sampler": "euler", "cfg_interval": (0, 1)}),
        (mean_flow.MeanFlow(), {"conditions": ("t", "h", "y")}, {"num_steps": "1"}),
        (mean_flow.ImprovedMeanFlow(), HEADS | JIT, {"num_steps": "2", "omega": 3.0}),
    ],
)
def test_the_flops_of_an_image_are_those_of_the_program(process, model, options):
    config = dit.configure("Ti", 4, **SMALL | {"learn_sigma": False} | model)
    if isinstance(process, mean_flow.AverageVelocity):
        options = {"sampler": "euler", "cfg_scale": 1.0, "cfg_interval": (0, 1)} | options
    sampling = dataclasses.replace(SAMPLING, **options)
    made = generate.make(
        *(timed(dit.make_apply(config), process), config, process, sharding.make_mesh()),
        **{"space": "latents", "sampling": sampling},
    )
    params = jax.eval_shape(lambda: dit.init(config, jax.random.key(0)))
    given = {"labels": np.arange(8), "key_data": np.zeros((8, 2), np.uint32)}
    products = count_products(jax.make_jaxpr(made)(params, given).jaxpr)
    assert 8 * generate.count_flops(config, process, sampling) == 2 * products
