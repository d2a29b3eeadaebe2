import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from modules import apply_linear, normal, with_bias

from dit_jax.models import layers


@pytest.mark.parametrize(
    "p, grid, c",
    [
        *((1, (3, 5), 2), (2, (4, 8), 4), (4, (8, 4), 1), (3, (6, 9), 3)),
        *((2, (6,), 3), (2, (4, 6, 2), 3), (2, (2, 4, 2, 4), 1)),
    ],
)
def test_unpatchify_inverts_patchify(p, grid, c):
    x = normal(0, (2, *grid, c))
    tokens = layers.patchify(x, p)
    assert tokens.shape == (2, np.prod(grid) // p ** len(grid), p ** len(grid) * c)
    np.testing.assert_array_equal(layers.unpatchify(tokens, p, grid), x)


def test_a_patch_of_a_video_is_a_block_of_frames_rows_and_columns():
    x = normal(0, (1, 4, 6, 2, 3))
    tokens = layers.patchify(x, 2)
    np.testing.assert_array_equal(tokens[0, 1 * 3 + 2], x[0, 2:4, 4:6, 0:2].ravel())


def test_patchify_takes_rows_first_and_the_channel_is_the_fastest():
    x = normal(0, (1, 4, 6, 3))
    tokens = layers.patchify(x, 2)
    second_row_last_column = tokens[0, 1 * 3 + 2]
    np.testing.assert_array_equal(second_row_last_column, x[0, 2:4, 4:6].ravel())


def test_first_half_of_the_position_table_encodes_the_column():
    height, width, size = 3, 5, 16
    row, column = np.indices((height, width), np.float32)
    position = layers.patchify(np.stack([row, column], axis=-1)[None], 1)[0]  # (T, 2)
    omega = 1e4 ** (-np.arange(size // 4) / (size // 4))
    for half, index in ((slice(0, size // 2), 1), (slice(size // 2, size), 0)):
        angle = position[:, index, None] * omega
        expected = np.concatenate([np.sin(angle), np.cos(angle)], axis=1)
        table = layers.position_table((height, width), size)[:, half]
        np.testing.assert_allclose(table, expected, atol=1e-6)


def test_position_table_of_three_axes_tells_every_token_apart():
    table = layers.position_table((2, 3, 4), 14)  # the last axis first, two frequencies each
    assert table.shape == (24, 14) and len(np.unique(table, axis=0)) == 24
    assert not table[:, 12:].any()
    frame, row, column = (x.ravel() for x in np.indices((2, 3, 4)))
    for i, index in enumerate((column, row, frame)):
        angle = np.outer(index, [1, 0.01])
        expected = np.concatenate([np.sin(angle), np.cos(angle)], axis=1)
        np.testing.assert_allclose(table[:, 4 * i : 4 * i + 4], expected, atol=1e-6)


def test_layer_norm_is_exact_beside_a_large_mean():
    x = normal(0, (2, 3, 64)) + np.float32(1000)
    centred = np.float64(x) - np.float64(x).mean(-1, keepdims=True)
    expected = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
    # One pass, E[x^2] - E[x]^2, would lose 1000^2 * 2^-24 = 6 % of the variance.
    np.testing.assert_allclose(layers.layer_norm(jnp.asarray(x)), expected, atol=1e-3)


def test_layer_norm_of_bfloat16_keeps_its_type_and_counts_in_float32():
    x = jnp.asarray(normal(0, (2, 512)), jnp.bfloat16)
    y = layers.layer_norm(x)
    assert y.dtype == jnp.bfloat16
    exact = layers.layer_norm(x.astype(jnp.float32)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(y.astype(jnp.float32), exact.astype(jnp.float32))


def test_layer_norm_has_the_official_epsilon():
    x = jnp.asarray([[-1e-3, 1e-3]])
    np.testing.assert_allclose(layers.layer_norm(x), x / np.sqrt(2e-6), rtol=1e-5)


def test_modulate():
    x, shift, scale = jnp.full((1, 2, 3), 5.0), jnp.full((1, 1, 3), 0.5), jnp.full((1, 1, 3), 2.0)
    np.testing.assert_array_equal(layers.modulate(x, shift, scale), np.full((1, 2, 3), 15.5))


def test_mlp_is_a_tanh_gelu_between_two_linears():
    mlp = with_bias(layers.Mlp(8, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    x = normal(0, (2, 3, 8))
    hidden = apply_linear(mlp.fc1, x)
    assert hidden.shape == (2, 3, 32)
    inner = np.sqrt(2 / np.pi) * (hidden + 0.044715 * hidden**3)
    hidden = 0.5 * hidden * (1 + np.tanh(inner))
    np.testing.assert_allclose(mlp(x), apply_linear(mlp.fc2, hidden), atol=1e-5)


@pytest.mark.parametrize("make", [layers.Linear, functools.partial(layers.JoinedLinear, count=3)])
@pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 4, 5)])
def test_flat_products_give_the_same_linears(make, shape):
    """Their gradients too: of the rows, the kernel and the bias."""
    x = normal(0, shape)

    def run(product):
        options = {"rngs": nnx.Rngs(0), "dot_general": product}
        graphdef, params = nnx.split(make(5, out_features=7, **options))
        params = jax.tree.map(lambda param: normal(1, param.shape), params)
        out, back = jax.vjp(lambda params, x: nnx.merge(graphdef, params)(x), params, x)
        return jax.tree.leaves((out, back(jax.tree.map(jnp.cos, out))))

    for found, expected in zip(*map(run, layers.PRODUCTS.values()), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
