"""Caches of a DiT: what they cost, and how near their samples come to those without."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_run

from dit_jax import settings
from dit_jax.diffusion import caches, flow
from dit_jax.errors import UserError
from dit_jax.machine import sharding
from dit_jax.models import dit, flops
from dit_jax.sampling import calibrate, fields, generate

IMAGE = {"input_size": (8, 8), "in_channels": 1, "num_classes": 10, "learn_sigma": False}
CONFIG = dit.configure("Pi", 4, **IMAGE)
PROCESS = flow.Flow("linear")
SAMPLING = settings.Sampling(
    sampler="ddim", num_steps="12", cfg_scale=2.0, cfg_channels=0, cfg_interval=(0, 1)
)
LABELS = np.arange(8)


@pytest.fixture(scope="module")
def params():
    return random_run.draw(CONFIG)[0]


def draw(params, *, config=CONFIG, mesh=None, labels=LABELS, trajectory=True, **options):
    """Latents of SAMPLING with other options at all levels, (N, S+1, H, W, C)."""
    sampling = dataclasses.replace(SAMPLING, **options)
    mesh = mesh or sharding.make_mesh()
    made = generate.make(
        *(dit.make_apply(config), config, PROCESS, mesh),
        space="latents",
        sampling=sampling,
        trajectory=trajectory,
    )
    return generate.run(made, params, labels, seed=0, batch_size=8)


@pytest.fixture(scope="module")
def uncached(params):
    return draw(params)


def test_a_schedule_of_all_steps_is_no_cache_to_the_bit(params, uncached):
    whole = {"cache": "every:1", "cache_guidance": "steps:0-11", "cache_order": 3}
    np.testing.assert_array_equal(draw(params, **whole), uncached)


def test_more_computed_steps_come_closer(params, uncached):
    errors = []
    for every in (6, 2):
        cached = draw(params, cache=f"every:{every}")
        errors.append(np.abs(cached - uncached)[:, -1].mean() / np.abs(uncached[:, -1]).mean())
    assert 0.5 > errors[0] > 2 * errors[1] > 0


@pytest.mark.parametrize(
    "options",
    [
        {"sampler": "ddpm", "cache_guidance": "every:2"},
        pytest.param({"sampler": "heun", "num_steps": "6"}, marks=pytest.mark.slow),
        pytest.param({"sampler": "unipc", "cfg_interval": (0, 0.7)}, marks=pytest.mark.slow),
        pytest.param({"sampler": "sde", "cfg_scale": 1.0}, marks=pytest.mark.slow),
    ],
)
def test_one_device_draws_what_eight_draw_and_a_batch_does_not_matter(params, options):
    options = {"cache": "every:2"} | options
    eight = draw(params, **options)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    few = draw(jax.device_get(params), mesh=mesh, labels=LABELS[:3], **options)
    np.testing.assert_allclose(eight[:3], few, rtol=1e-4, atol=1e-4)


def test_a_trajectory_ends_at_the_sample(params):
    path = draw(params, cache="every:3")
    assert path.shape == (8, 13, 8, 8, 1)
    last = draw(params, cache="every:3", trajectory=False)
    np.testing.assert_allclose(path[:, -1], last, rtol=1e-5, atol=1e-5)


DESIGNS = [
    "in_context",
    *(pytest.param(x, marks=pytest.mark.slow) for x in ("cross_attention", "adaln")),
]


@pytest.mark.parametrize("conditioning", DESIGNS)
def test_every_design_splits_into_blocks_and_the_rest(conditioning):
    """What blocks add, added again, is the output; the blocks get tokens of the image only."""
    config = CONFIG._replace(conditioning=conditioning)
    (params, _), apply = random_run.draw(config), dit.make_apply(config)

    def model(x, **given):
        return apply(params, x, **given)

    x = jax.random.normal(jax.random.key(1), (2, 8, 8, 1))
    t, given = jnp.float32(300), {"y": jnp.array([3, 1])}
    out, residual = caches.compute(model, x, t, given)
    assert residual.shape == (2, 4, config.hidden_size)
    np.testing.assert_array_equal(out, apply(params, x, t=jnp.full(2, t), **given))
    again = caches.reuse(model, x, t, given, residual)
    np.testing.assert_allclose(again, out, rtol=1e-4, atol=1e-5)
    assert not np.allclose(caches.reuse(model, x, t, given, 0 * residual), out, atol=1e-3)


def count_products(jaxpr):
    """The matrix products of a jaxpr, without those of its branches; and those of each branch."""
    own, branches = 0, []
    for equation in jaxpr.eqns:
        own += equation.primitive.name == "dot_general"
        is_choice = equation.primitive.name == "cond"
        for each in jax.tree.leaves(list(equation.params.values()), is_leaf=callable):
            if not hasattr(each := getattr(each, "jaxpr", each), "eqns"):
                continue
            inner, others = count_products(each)
            branches += [inner] if is_choice else others
            own += 0 if is_choice else inner
    return own, branches


def test_a_forecast_step_multiplies_for_embedders_and_final_layer_only(params):
    sampling = dataclasses.replace(SAMPLING, cache="every:3")
    mesh = sharding.make_mesh()
    made = generate.make(
        *(dit.make_apply(CONFIG), CONFIG, PROCESS, mesh), space="latents", sampling=sampling
    )
    keys = np.zeros((8, 2), np.uint32)
    jaxpr = jax.make_jaxpr(made)(params, {"labels": LABELS, "key_data": keys}).jaxpr
    _, branches = count_products(jaxpr)
    # x, two of the time, two of the final layer, for each half; a block has six more, in a loop
    assert branches == [10, 5 + 7]


@pytest.mark.parametrize(
    "options, calls, passes",
    [
        ({}, 12, 24),
        ({"cache": "every:3"}, 5, 10),
        ({"cache": "every:3", "cfg_scale": 1.0}, 5, 5),
        ({"cache_guidance": "every:3"}, 12, 17),
        ({"cache": "every:2", "cache_guidance": "every:2"}, 7, 11),
        ({"cache": "every:3", "sampler": "heun"}, 9, 18),  # the last step calls once
        ({"cache": "every:3", "cfg_interval": (0, 0.5)}, 5, 8),  # guided from step 6 on
    ],
)
def test_what_is_forecast_is_not_counted_as_a_pass(options, calls, passes):
    sampling = dataclasses.replace(SAMPLING, **options)
    assert generate.count_calls(PROCESS, sampling) == calls
    assert generate.count_passes(PROCESS, sampling) == passes
    plan = generate.make_plan(PROCESS, sampling)
    rest = plan.passes_without_cache().sum() - passes
    expected = passes * flops.forward_flops(CONFIG) + rest * flops.forecast_flops(CONFIG)
    assert generate.count_flops(CONFIG, PROCESS, sampling) == expected


def test_the_cache_of_xl_2_is_counted_in_bytes_and_its_forecast_is_cheap():
    config = dit.configure("XL", 2)
    sampling = dataclasses.replace(SAMPLING, cache="every:3", cache_order=2)
    values = 256 * 1152  # tokens, hidden size
    assert generate.cache_bytes(config, PROCESS, sampling, "bfloat16") == 6 * 2 * values
    assert generate.cache_bytes(config, PROCESS, SAMPLING, "bfloat16") == 0
    assert flops.forecast_flops(config) < 0.001 * flops.forward_flops(config)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"cache": "every:12"}, "cache must be every:N with N in 1 .. 11 for 12 steps, got every:"),
        ({"cache": "steps:3+12"}, r"of steps in 0 .. 11 for 12 steps, got 12 in steps:3\+12"),
        (
            {"cache_guidance": "every:2", "cfg_scale": 1.0},
            "cache_guidance must be none without guidance, whose cfg_scale is 1, got every:2",
        ),
        (
            {"cache": "every:2", "cache_guidance": "steps:3"},
            "cache_guidance must be of steps that compute the guided network, got step 3 in steps",
        ),
    ],
)
def test_a_cache_that_does_not_fit_is_one_line(options, message):
    with pytest.raises(UserError, match=message):
        generate.check(CONFIG, PROCESS, dataclasses.replace(SAMPLING, **options))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"cache": "every"}, 'cache must be none, "every:3", "every:3:10-40" or "steps:0'),
        ({"cache_order": 4}, "cache_order must be in 0 .. 3, got 4"),
        ({"cache_fit": "spline"}, "cache_fit must be one of taylor, chebyshev, got 'spline'"),
    ],
)
def test_a_cache_that_is_misspelt_is_one_line(options, message):
    with pytest.raises(UserError, match=f"^{message}"):
        settings.read_topic(settings.Sampling, options)


def test_schedules_can_be_swept():
    found = fields.read_sweep("cache=none,every:2,every:3:1-9,steps:0+4-6")
    assert found == ("cache", ["none", "every:2", "every:3:1-9", "steps:0+4-6"])
    assert fields.read_sweep("cache_order=0,1") == ("cache_order", [0, 1])
    with pytest.raises(UserError, match="^cache must be none, \"every:3\", .*, got 'always'$"):
        fields.read_sweep("cache=none,always")


def test_a_schedule_is_checked_without_jax_and_no_bundle_has_a_cache():
    model, diffusion = CONFIG, settings.Diffusion()
    with pytest.raises(UserError, match=r"cache must be of steps in 0 .. 11 for 12 steps, got 12"):
        fields.check_process(dataclasses.replace(SAMPLING, cache="steps:12"), model, diffusion)
    assert fields.is_in_torch(SAMPLING)
    assert not fields.is_in_torch(dataclasses.replace(SAMPLING, cache="every:2"))


def test_a_threshold_computes_where_changes_add_up():
    changes = np.array([0.3, 0.1, 0.1, 0.1, 0.05, 0.5, 0.1])
    assert np.flatnonzero(calibrate.choose(changes, 0.25)).tolist() == [0, 1, 4, 6, 7]
    assert calibrate.choose(changes, 0.0).all()
    assert calibrate.calibrate(changes, 0.25).cache == "steps:0-1+4+6-7"
    for count in range(2, 9):
        found = calibrate.calibrate(changes, count)
        computed = calibrate.choose(changes, found.threshold)
        assert count - 2 <= computed.sum() <= count
        if found.threshold:  # any lower one computes too many
            assert calibrate.choose(changes, 0.999 * found.threshold).sum() > count


def test_the_change_of_the_first_block_is_measured_along_a_trajectory(params, uncached):
    x = uncached
    time = generate.make_levels(PROCESS, SAMPLING).time[:-1]
    apply = dit.make_apply(CONFIG._replace(depth=1))
    changes = calibrate.measure(apply, params, x, time, LABELS)
    assert changes.shape == (11,) and (changes > 0).all()
    watch = dit.make_apply(CONFIG, watch=True)

    def residual(level):
        t = jnp.full(8, time[level], jnp.float32)
        tokens = watch(params, jnp.asarray(x[:, level]), t=t, y=jnp.asarray(LABELS))[1].x
        return tokens[1] - tokens[0]

    before, after = residual(4), residual(5)
    expected = jnp.abs(after - before).sum() / jnp.abs(before).sum()
    np.testing.assert_allclose(changes[4], expected, rtol=1e-4)
