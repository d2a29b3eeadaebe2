import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.diffusion import guidance, samplers, schedules
from dit_jax.models import dit

NULL = 7
LABELS = np.array([2, 5], np.int32)
ALWAYS = {"null_label": NULL, "channels": 4, "interval": (0, 999)}
X = np.random.default_rng(0).standard_normal((2, 2, 2, 4), np.float32)


def model(x, t, y):
    """Noise 0.1 x + y and variance code -y, plus a trace of t."""
    y = (y.astype(jnp.float32) + 0.001 * t.astype(jnp.float32))[:, None, None, None]
    return jnp.concatenate([0.1 * x + y, jnp.broadcast_to(-y, x.shape)], axis=-1)


def test_golden_guided_forward(golden, golden_images, make_model, check_close):
    """The official rows: guided conditional ones, then null ones under the same guided noise."""
    net = make_model(dit.configure("S", 8))
    z, y = golden_images("z", 2), np.array([207, 360], np.int32)
    options = {"null_label": 1000, "scale": 4.0, "channels": 3, "interval": (0, 999)}

    @jax.jit
    def forward(params, z):
        plain = functools.partial(net.apply, params)
        noise, code = guidance.guide(plain, y, **options)(z, 500)
        null = plain(z, jnp.full(2, 500), jnp.full(2, 1000))
        conditional = jnp.concatenate([noise, code], axis=-1)
        unconditional = jnp.concatenate([noise[..., :3], null[..., 3:]], axis=-1)
        return jnp.concatenate([conditional, unconditional])

    check_close("cfg/forward", forward(net.params, z), golden["cfg/forward"], 1e-4)


def test_condition_hands_the_model_its_step_and_labels():
    noise, code = guidance.condition(model, LABELS)(X, 300)
    label = (LABELS + 0.3).astype(np.float32)[:, None, None, None]
    np.testing.assert_allclose(noise, np.float32(0.1) * X + label, rtol=1e-5)
    np.testing.assert_allclose(code, np.broadcast_to(-label, X.shape), rtol=1e-5)


def test_scale_1_is_no_guidance():
    noise, code = guidance.guide(model, LABELS, scale=1.0, **ALWAYS)(X, 300)
    plain_noise, plain_code = guidance.condition(model, LABELS)(X, 300)
    np.testing.assert_allclose(noise, plain_noise, atol=1e-5)
    np.testing.assert_array_equal(code, plain_code)


@pytest.mark.parametrize("scale", [0.0, 1.5, 4.0])
def test_guidance_leads_away_from_the_null_label(scale):
    noise, code = guidance.guide(model, LABELS, scale=scale, **ALWAYS)(X, 300)
    conditional, plain_code = guidance.condition(model, LABELS)(X, 300)
    null, _ = guidance.condition(model, np.full(2, NULL, np.int32))(X, 300)
    np.testing.assert_allclose(noise, null + scale * (conditional - null), atol=1e-5)
    np.testing.assert_array_equal(code, plain_code)


def test_channels_beyond_the_guided_ones_stay_conditional():
    options = ALWAYS | {"channels": 3, "scale": 4.0}
    noise, _ = guidance.guide(model, LABELS, **options)(X, 300)
    everywhere, _ = guidance.guide(model, LABELS, **options | {"channels": 4})(X, 300)
    conditional, _ = guidance.condition(model, LABELS)(X, 300)
    np.testing.assert_array_equal(noise[..., :3], everywhere[..., :3])
    np.testing.assert_array_equal(noise[..., 3:], conditional[..., 3:])
    assert np.abs(noise[..., 3:] - everywhere[..., 3:]).min() > 1


def test_without_learned_variance_there_is_no_code():
    def bare(x, t, y):
        return model(x, t, y)[..., :4]

    noise, code = guidance.guide(bare, LABELS, scale=3.0, **ALWAYS)(X, 300)
    expected, _ = guidance.guide(model, LABELS, scale=3.0, **ALWAYS)(X, 300)
    assert code is None
    np.testing.assert_array_equal(noise, expected)


@pytest.mark.parametrize("t, rows", [(99, 2), (100, 4), (400, 4), (401, 2)])
def test_outside_the_interval_the_null_label_is_not_evaluated(t, rows):
    """Counted where the model runs: a callback tells how many rows it was given."""
    options = ALWAYS | {"interval": (100, 400), "scale": 4.0}
    seen = []

    def counted(x, t, y):
        jax.debug.callback(lambda y: seen.append(y.tolist()), y)
        return model(x, t, y)

    denoise = jax.jit(guidance.guide(counted, LABELS, **options))
    noise, _ = jax.block_until_ready(denoise(X, jnp.asarray(t)))
    jax.effects_barrier()
    assert seen == [[2, 5] + [NULL] * (rows - 2)]
    conditional, _ = guidance.condition(model, LABELS)(X, t)
    assert np.allclose(noise, conditional, atol=1e-5) == (rows == 2)


def test_a_sampler_evaluates_the_null_label_inside_the_interval_only():
    """Within the sampler's loop, at the steps of the long diffusion."""
    seen = []

    def counted(x, t, y):
        jax.debug.callback(lambda t: seen.append((int(t[0]), len(t))), t)
        return model(x, t, y)

    options = ALWAYS | {"interval": (200, 500), "scale": 4.0}
    short = schedules.respace(schedules.linear(), "ddim10")
    denoise = guidance.guide(counted, LABELS, **options)
    jax.block_until_ready(jax.jit(lambda x: samplers.ddim(denoise, x, short))(X))
    jax.effects_barrier()
    expected = [(t, 4 if 200 <= t <= 500 else 2) for t in range(0, 1000, 100)]
    assert sorted(seen) == expected
