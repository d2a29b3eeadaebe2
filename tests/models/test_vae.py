import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.errors import UserError
from dit_jax.models import vae

NARROW = vae.VAEConfig(channels=(8, 16, 16), num_resnets=1, num_groups=4)


@pytest.fixture(scope="module")
def params():
    return jax.jit(vae.init, static_argnums=0)(NARROW, jax.random.key(0))


def test_stable_diffusions_vae_has_83_million_parameters():
    shapes = jax.eval_shape(lambda: vae.init(vae.VAEConfig(), jax.random.key(0)))
    assert sum(x.size for x in jax.tree.leaves(shapes)) == 83_653_863


@pytest.mark.parametrize("height, width", [(16, 16), (8, 24)])
def test_encode_and_decode_shapes(params, height, width):
    encode, decode = vae.make_apply(NARROW)
    x = jax.random.uniform(jax.random.key(1), (2, height, width, 3), minval=-1)
    moments = jax.jit(encode)(params, x)
    assert moments.shape == (2, height // 4, width // 4, 8) and moments.dtype == jnp.float32
    decoded = jax.jit(decode)(params, vae.mode(moments))
    assert decoded.shape == x.shape and decoded.dtype == jnp.float32
    assert NARROW.downsampling == 4


def test_bfloat16_is_close_to_float32(params):
    z = jax.random.normal(jax.random.key(1), (1, 8, 8, 4))
    exact, approximate = (
        jax.jit(vae.make_apply(NARROW, dtype=dtype)[1])(params, z)
        for dtype in ("float32", "bfloat16")
    )
    error = np.abs(approximate - exact).max() / np.abs(exact).max()
    assert 1e-4 < error < 3e-2  # bfloat16 has 8 bits


def test_log_variance_is_clipped(params):
    large = jax.tree.map(lambda x: 1e4 * x, params["quant_conv"])
    encode = jax.jit(vae.make_apply(NARROW)[0])
    moments = encode(params | {"quant_conv": large}, jnp.ones((1, 16, 16, 3)))
    log_variance = moments[..., 4:]
    assert log_variance.min() >= -30 and log_variance.max() <= 20
    assert jnp.abs(log_variance).max() >= 20


def test_samples_have_the_mean_and_variance_of_the_moments():
    mean, log_variance = 3.0, np.log(0.25)
    moments = jnp.concatenate(
        [jnp.full((1, 64, 64, 4), mean), jnp.full((1, 64, 64, 4), log_variance)], axis=-1
    )
    z = vae.sample(moments, jax.random.normal(jax.random.key(0), (1, 64, 64, 4)))
    np.testing.assert_allclose([z.mean(), z.std()], [mean, 0.5], rtol=0.02)  # 16,384 draws
    np.testing.assert_array_equal(vae.mode(moments), jnp.full((1, 64, 64, 4), mean))
    np.testing.assert_array_equal(vae.sample(moments, jnp.zeros_like(z)), vae.mode(moments))


@pytest.mark.parametrize(
    "units, expected",
    [
        ({}, [0.18215, 0.3643]),
        ({"scale": (2.0,), "shift": (0.5,)}, [1.0, 3.0]),
        ({"scale": (1.0, 10.0), "shift": (1.0, 0.0)}, [0.0, 20.0]),
    ],
)
def test_model_units(units, expected):
    config = vae.VAEConfig(latent_channels=2)._replace(**units)
    z = jnp.array([[1.0, 2.0]])
    x0 = vae.to_model_units(z, config)
    np.testing.assert_allclose(x0[0], expected, rtol=1e-6)
    np.testing.assert_allclose(vae.from_model_units(x0, config), z, rtol=1e-6)


def test_moments_in_model_units_match_samples_in_model_units(params):
    config = NARROW._replace(scale=(2.0, -0.5, 1.0, 3.0), shift=(1.0, 0.0, 0.5, 2.0))
    moments = jax.random.normal(jax.random.key(0), (2, 4, 4, 8))
    noise = jax.random.normal(jax.random.key(1), (2, 4, 4, 4))
    expected = vae.to_model_units(vae.sample(moments, noise), config)
    signs = jnp.sign(jnp.broadcast_to(jnp.float32(config.scale), noise.shape))
    actual = vae.sample(vae.moments_to_model_units(moments, config), signs * noise)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_config_survives_json():
    config = NARROW._replace(scale=(1.0, 2.0, 3.0, 4.0))
    fields = {k: list(v) if isinstance(v, tuple) else v for k, v in config._asdict().items()}
    assert vae.VAEConfig.from_json(fields) == config


def test_unknown_dtype_raises():
    with pytest.raises(UserError, match="dtype must be one of float32, bfloat16, got 'float16'"):
        vae.make_apply(NARROW, dtype="float16")
