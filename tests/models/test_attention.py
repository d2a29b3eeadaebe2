import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from modules import apply_linear, normal, with_bias

from dit_jax.models import attention


def softmax_attention(q, k, v):
    """q (N, T, K, D/K), k and v (N, S, K, D/K) -> (N, T, D), in float64."""
    logits = np.einsum("ntkd,nskd->nkts", np.float64(q), k) / np.sqrt(q.shape[-1])
    weight = np.exp(logits - logits.max(-1, keepdims=True))
    weight /= weight.sum(-1, keepdims=True)
    return np.einsum("nkts,nskd->ntkd", weight, v).reshape(*q.shape[:2], -1)


def test_attention_is_the_softmax_of_scaled_products():
    layer = with_bias(
        attention.Attention(24, 3, dtype=jnp.float32, attention="xla", rngs=nnx.Rngs(0))
    )
    x = normal(0, (2, 5, 24))
    qkv = apply_linear(layer.qkv, x).reshape(2, 5, 3, 3, 8)
    mixed = softmax_attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2])
    np.testing.assert_allclose(layer(x), apply_linear(layer.proj, mixed), atol=1e-5)


def test_attention_leaves_the_weights_that_it_mixed_with():
    layer = attention.Attention(24, 3, dtype=jnp.float32, attention="xla", rngs=nnx.Rngs(0))
    x = normal(0, (2, 5, 24))
    plain = layer(x)
    assert not hasattr(layer, "weights")
    layer.keeps_weights = True
    np.testing.assert_array_equal(layer(x), plain)
    v = apply_linear(layer.qkv, x).reshape(2, 5, 3, 3, 8)[:, :, 2]
    mixed = np.einsum("nkts,nskd->ntkd", layer.weights[...], v).reshape(2, 5, 24)
    np.testing.assert_allclose(apply_linear(layer.proj, mixed), plain, atol=1e-5)


def test_attention_and_its_gradients_are_those_of_jax():
    q, k, v, weight = (jnp.asarray(normal(i, (2, 7, 3, 8))) for i in range(4))

    def total(attend):
        return lambda *x: (attend(*x) * weight).sum()

    alone, differentiated = attention.attend(q, k, v), jax.vjp(attention.attend, q, k, v)[0]
    for out in (alone, differentiated):  # two programs
        np.testing.assert_allclose(out, jax.nn.dot_product_attention(q, k, v), atol=1e-6)
    grads, expected = (
        jax.grad(total(attend), argnums=(0, 1, 2))(q, k, v)
        for attend in (attention.attend, jax.nn.dot_product_attention)
    )
    for x, y in zip(grads, expected, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)


def test_forward_mode_is_that_of_jax():
    x, d_x = (tuple(jnp.asarray(normal(i, (2, 7, 3, 8))) for i in range(j, j + 3)) for j in (0, 3))
    plain, change = jax.jvp(jax.nn.dot_product_attention, x, d_x)
    out, d_out = jax.jvp(attention.attend_forward, x, d_x)
    np.testing.assert_allclose(out, plain, atol=1e-6)
    np.testing.assert_allclose(d_out, change, atol=1e-5)


def test_gradients_of_forward_mode_are_those_of_jax():
    """Of what a jvp gives: the value, whose derivative may be stopped, and the derivative."""
    x, d_x = (tuple(jnp.asarray(normal(i, (2, 7, 3, 8))) for i in range(j, j + 3)) for j in (0, 3))

    def total(attend, stop):
        def loss(*x):
            out, change = jax.jvp(attend, x, d_x)
            return jnp.sum((out - (jax.lax.stop_gradient(change) if stop else change)) ** 2)

        return jax.grad(loss, argnums=(0, 1, 2))(*x)

    for stop in (True, False):
        for a, b in zip(
            total(attention.attend_forward, stop),
            total(jax.nn.dot_product_attention, stop),
            strict=True,
        ):
            np.testing.assert_allclose(a, b, atol=2e-6 * np.abs(b).max())


def test_attention_takes_large_logits():
    q = jnp.full((1, 3, 1, 4), 1e3)
    out, grads = jax.value_and_grad(lambda q: attention.attend(q, q, q / 1e3).sum())(q)
    assert out == pytest.approx(12) and np.isfinite(grads).all()


def test_cross_attention_is_the_softmax_over_the_conditions():
    layer = with_bias(attention.CrossAttention(24, 3, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    x, conditions = normal(0, (2, 5, 24)), normal(1, (2, 2, 24))
    q = apply_linear(layer.q, x).reshape(2, 5, 3, 8)
    kv = apply_linear(layer.kv, conditions).reshape(2, 2, 2, 3, 8)
    mixed = softmax_attention(q, kv[:, :, 0], kv[:, :, 1])
    actual = layer(x, conditions)
    np.testing.assert_allclose(actual, apply_linear(layer.proj, mixed), atol=1e-5)


@pytest.mark.parametrize(
    "attend", [attention.attend, lambda *x: attention.attend_fused(*x, implementation="xla")]
)
def test_rematerialisation_by_dots_keeps_the_output(attend):
    """What cross-attention and cuDNN give has the name that the policy "dots" keeps, as ours."""
    q = jnp.ones((1, 3, 1, 4))
    text = str(jax.make_jaxpr(lambda q: jax.grad(lambda q: attend(q, q, q).sum())(q))(q))
    assert f"name={attention.KEPT}" in text
