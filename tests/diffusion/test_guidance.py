import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.diffusion import ddpm, guidance, samplers, schedules
from dit_jax.diffusion.losses import split_output
from dit_jax.diffusion.process import predictor
from dit_jax.models import dit

NULL = 7
LABELS = np.array([2, 5], np.int32)
GIVEN = {"y": LABELS}
OPTIONS = {"nulls": {"y": NULL}, "channels": 4}
X = np.random.default_rng(0).standard_normal((2, 2, 2, 4), np.float32)


def model(x, t, y):
    """Noise 0.1 x + y and variance code -y, plus a trace of t."""
    y = (y.astype(jnp.float32) + 0.001 * t.astype(jnp.float32))[:, None, None, None]
    return jnp.concatenate([0.1 * x + y, jnp.broadcast_to(-y, x.shape)], axis=-1)


def test_golden_guided_forward(golden, golden_images, make_model, check_close):
    """The official rows: guided conditional ones, then null ones under the same guided noise."""
    net = make_model(dit.configure("S", 8))
    z, y = golden_images("z", 2), np.array([207, 360], np.int32)
    options = {"nulls": {"y": 1000}, "channels": 3}

    @jax.jit
    def forward(params, z):
        plain = functools.partial(net.apply, params)
        conditional = guidance.guide(plain, {"y": y}, **options)(z, 500, 4.0)
        null = plain(z, t=jnp.full(2, 500), y=jnp.full(2, 1000))
        unconditional = jnp.concatenate([conditional[..., :3], null[..., 3:]], axis=-1)
        return jnp.concatenate([conditional, unconditional])

    check_close("cfg/forward", forward(net.params, z), golden["cfg/forward"], 1e-4)


def test_condition_passes_the_time_and_the_labels_to_the_model():
    noise, code = split_output(guidance.condition(model, GIVEN)(X, 300), 4)
    label = (LABELS + 0.3).astype(np.float32)[:, None, None, None]
    np.testing.assert_allclose(noise, np.float32(0.1) * X + label, rtol=1e-5)
    np.testing.assert_allclose(code, np.broadcast_to(-label, X.shape), rtol=1e-5)


def guided(x, t, scale, **options):
    """Noise and variance code of the network with guidance."""
    return split_output(guidance.guide(model, GIVEN, **OPTIONS | options)(x, t, scale), 4)


@pytest.mark.parametrize("scale", [0.0, 1.0, 1.5, 4.0])
def test_guidance_extrapolates_from_the_null_label(scale):
    noise, code = guided(X, 300, scale)
    conditional, plain_code = split_output(guidance.condition(model, GIVEN)(X, 300), 4)
    null, _ = split_output(guidance.condition(model, {"y": np.full(2, NULL, np.int32)})(X, 300), 4)
    np.testing.assert_allclose(noise, null + scale * (conditional - null), atol=1e-5)
    np.testing.assert_array_equal(code, plain_code)


def test_channels_beyond_the_guided_ones_stay_conditional():
    noise, _ = guided(X, 300, 4.0, channels=3)
    everywhere, _ = guided(X, 300, 4.0)
    conditional, _ = split_output(guidance.condition(model, GIVEN)(X, 300), 4)
    np.testing.assert_array_equal(noise[..., :3], everywhere[..., :3])
    np.testing.assert_array_equal(noise[..., 3:], conditional[..., 3:])
    assert np.abs(noise[..., 3:] - everywhere[..., 3:]).min() > 1


def test_without_learned_variance_there_is_no_code():
    def bare(x, t, y):
        return model(x, t, y)[..., :4]

    noise, code = split_output(guidance.guide(bare, GIVEN, **OPTIONS)(X, 300, 3.0), 4)
    expected, _ = guided(X, 300, 3.0)
    assert code is None
    np.testing.assert_array_equal(noise, expected)


@pytest.mark.parametrize("scale, rows", [(1.0, 2), (1.5, 4), (0.0, 4)])
def test_at_scale_1_the_null_label_is_not_evaluated(scale, rows):
    """Counted inside the model, by a callback with its labels."""
    seen = []

    def counted(x, t, y):
        jax.debug.callback(lambda y: seen.append(y.tolist()), y)
        return model(x, t, y)

    network = jax.jit(guidance.guide(counted, GIVEN, **OPTIONS))
    jax.block_until_ready(network(X, 300, jnp.float32(scale)))
    jax.effects_barrier()
    assert seen == [[2, 5] + [NULL] * (rows - 2)]


def test_a_scale_is_of_the_time_at_which_a_step_begins():
    levels = ddpm.DDPM(schedules.linear()).levels_at([900, 600, 400, 399, 100, 0])
    scales = guidance.scales(levels, scale=4.0, interval=(100, 400))
    np.testing.assert_array_equal(scales, [1, 1, 4, 4, 4, 1])
    edges = guidance.edges(scales)
    np.testing.assert_array_equal(edges, [False, False, True, False, False, True])
    np.testing.assert_array_equal(guidance.scales(levels, scale=1.3, interval=(0, 999)), [1.3] * 6)
    assert not guidance.edges(np.full(6, 1.3)).any()


@pytest.mark.parametrize(
    "schedule, middle", [("constant", [3, 3, 3]), ("linear", [1, 2, 2.5]), ("cosine", [1, 2, 2.71])]
)
def test_a_schedule_lets_the_scale_rise_to_the_data(schedule, middle):
    """The first level is noise, the others are at a half and a quarter of its time."""
    levels = ddpm.DDPM(schedules.linear(801)).levels_at([800, 400, 200])
    scales = guidance.scales(levels, scale=3.0, interval=(0, 800), schedule=schedule)
    np.testing.assert_allclose(scales, middle, atol=0.01)


def test_a_sampler_evaluates_the_null_label_inside_the_interval_only():
    """In the loop of the sampler, at the steps that the model was trained on."""
    seen = []

    def counted(x, t, y):
        jax.debug.callback(lambda t: seen.append((int(t[0]), len(t))), t)
        return model(x, t, y)

    process = ddpm.DDPM(schedules.linear())
    levels = process.levels("ddim10")
    network = guidance.guide(counted, GIVEN, **OPTIONS)
    scales = guidance.scales(levels, scale=4.0, interval=(200, 500))
    predict = predictor(network, process, levels, scales=scales)
    run = jax.jit(lambda x: samplers.run(samplers.ddim(levels), predict, x))
    jax.block_until_ready(run(X))
    jax.effects_barrier()
    expected = [(t, 4 if 200 <= t <= 500 else 2) for t in range(0, 1000, 100)]
    assert sorted(seen) == expected


def test_a_condition_without_a_null_is_given_in_both_halves():
    seen = []

    def counted(x, t, y, action):
        jax.debug.callback(lambda *xs: seen.append([x.tolist() for x in xs]), y, action)
        return model(x, t, y)

    given = GIVEN | {"action": np.array([3, 4], np.int32)}
    jax.block_until_ready(guidance.guide(counted, given, **OPTIONS)(X, jnp.asarray(3), 2.0))
    jax.effects_barrier()
    assert seen == [[[2, 5, NULL, NULL], [3, 4, 3, 4]]]
