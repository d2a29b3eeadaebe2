import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dit_jax.models import layers


def normal(seed, shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


@pytest.mark.parametrize("p, h, w, c", [(1, 3, 5, 2), (2, 4, 8, 4), (4, 8, 4, 1), (3, 6, 9, 3)])
def test_unpatchify_inverts_patchify(p, h, w, c):
    x = normal(0, (2, h, w, c))
    tokens = layers.patchify(x, p)
    assert tokens.shape == (2, (h // p) * (w // p), p * p * c)
    np.testing.assert_array_equal(layers.unpatchify(tokens, p, h, w), x)


def test_patchify_takes_rows_first_and_the_channel_is_the_fastest():
    x = normal(0, (1, 4, 6, 3))
    tokens = layers.patchify(x, 2)
    second_row_last_column = tokens[0, 1 * 3 + 2]
    np.testing.assert_array_equal(second_row_last_column, x[0, 2:4, 4:6].ravel())


def test_first_half_of_the_position_table_encodes_the_column():
    height, width, size = 3, 5, 16
    row, column = np.indices((height, width), np.float32)
    place = layers.patchify(np.stack([row, column], axis=-1)[None], 1)[0]  # (T, 2)
    omega = 1e4 ** (-np.arange(size // 4) / (size // 4))
    for half, index in ((slice(0, size // 2), 1), (slice(size // 2, size), 0)):
        angle = place[:, index, None] * omega
        expected = np.concatenate([np.sin(angle), np.cos(angle)], axis=1)
        table = layers.position_table(height, width, size)[:, half]
        np.testing.assert_allclose(table, expected, atol=1e-6)


def test_timestep_embedding_is_cosines_then_sines_of_falling_frequency():
    t = np.array([0, 1, 999])
    embedding = layers.timestep_embedding(jnp.asarray(t, jnp.int32))
    frequency = 1e4 ** (-np.arange(128) / 128)
    angle = t[:, None] * frequency
    expected = np.concatenate([np.cos(angle), np.sin(angle)], axis=1)
    # float32 angles up to 999 are known to 999 * 2^-24 = 6e-5.
    np.testing.assert_allclose(embedding, expected, atol=1e-4)


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


def softmax_attention(q, k, v):
    """q (N, T, K, D/K), k and v (N, S, K, D/K) -> (N, T, D), in float64."""
    logits = np.einsum("ntkd,nskd->nkts", np.float64(q), k) / np.sqrt(q.shape[-1])
    weight = np.exp(logits - logits.max(-1, keepdims=True))
    weight /= weight.sum(-1, keepdims=True)
    return np.einsum("nkts,nskd->ntkd", weight, v).reshape(*q.shape[:2], -1)


def apply_linear(linear, x):
    """Of several joined linears, one after the other."""
    kernel = np.asarray(linear.kernel[...])
    return np.float64(x) @ kernel.reshape(len(kernel), -1) + np.ravel(linear.bias[...])


def with_bias(module):
    """The module, its biases no longer 0."""
    state = nnx.to_pure_dict(nnx.state(module, nnx.Param))
    state = jax.tree.map(lambda x: x + 0.1 * normal(x.size, x.shape), state)
    return nnx.merge(nnx.graphdef(module), state)


def test_attention_is_the_softmax_of_scaled_products():
    attention = with_bias(
        layers.Attention(24, 3, dtype=jnp.float32, attention="xla", rngs=nnx.Rngs(0))
    )
    x = normal(0, (2, 5, 24))
    qkv = apply_linear(attention.qkv, x).reshape(2, 5, 3, 3, 8)
    mixed = softmax_attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2])
    np.testing.assert_allclose(attention(x), apply_linear(attention.proj, mixed), atol=1e-5)


def test_attention_and_its_gradients_are_those_of_jax():
    q, k, v, weight = (jnp.asarray(normal(i, (2, 7, 3, 8))) for i in range(4))

    def total(attend):
        return lambda *x: (attend(*x) * weight).sum()

    np.testing.assert_allclose(
        layers.attend(q, k, v), jax.nn.dot_product_attention(q, k, v), atol=1e-6
    )
    grads, expected = (
        jax.grad(total(attend), argnums=(0, 1, 2))(q, k, v)
        for attend in (layers.attend, jax.nn.dot_product_attention)
    )
    for x, y in zip(grads, expected, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)


def test_attention_takes_large_logits():
    q = jnp.full((1, 3, 1, 4), 1e3)
    out, grads = jax.value_and_grad(lambda q: layers.attend(q, q, q / 1e3).sum())(q)
    assert out == pytest.approx(12) and np.isfinite(grads).all()


def test_cross_attention_looks_at_the_memory_alone():
    attention = with_bias(layers.CrossAttention(24, 3, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    x, memory = normal(0, (2, 5, 24)), normal(1, (2, 2, 24))
    q = apply_linear(attention.q, x).reshape(2, 5, 3, 8)
    kv = apply_linear(attention.kv, memory).reshape(2, 2, 2, 3, 8)
    mixed = softmax_attention(q, kv[:, :, 0], kv[:, :, 1])
    actual = attention(x, memory)
    np.testing.assert_allclose(actual, apply_linear(attention.proj, mixed), atol=1e-5)


def test_mlp_is_a_tanh_gelu_between_two_linears():
    mlp = with_bias(layers.Mlp(8, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    x = normal(0, (2, 3, 8))
    hidden = apply_linear(mlp.fc1, x)
    assert hidden.shape == (2, 3, 32)
    inner = np.sqrt(2 / np.pi) * (hidden + 0.044715 * hidden**3)
    hidden = 0.5 * hidden * (1 + np.tanh(inner))
    np.testing.assert_allclose(mlp(x), apply_linear(mlp.fc2, hidden), atol=1e-5)


def test_timestep_embedder_is_a_silu_between_two_linears():
    embedder = with_bias(layers.TimestepEmbedder(8, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    t = jnp.asarray([3, 700], jnp.int32)
    hidden = apply_linear(embedder.fc1, layers.timestep_embedding(t))
    hidden = hidden / (1 + np.exp(-hidden))
    np.testing.assert_allclose(embedder(t), apply_linear(embedder.fc2, hidden), atol=1e-5)
