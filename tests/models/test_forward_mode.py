"""A DiT differentiated forward inside a loss, as MeanFlow needs it: every design, every remat."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_run

from dit_jax.models import attention, dit
from dit_jax.models.fields import DESIGNS

PLAIN = "plain"  # jax's own softmax attention, which has every derivative
FAST = ("adaln_zero", "dots")  # five seconds each
CASES = [
    pytest.param(*each, marks=() if each == FAST else pytest.mark.slow)
    for each in itertools.product(DESIGNS, ("none", "dots", "full"))
]


@pytest.fixture(autouse=True)
def with_plain_attention(monkeypatch):
    monkeypatch.setitem(attention.ATTENTIONS, PLAIN, jax.nn.dot_product_attention)
    monkeypatch.setitem(dit.fields.ARITHMETIC, "attention", ("xla_jvp", PLAIN))


@functools.cache
def gradient(conditioning, name, remat="none", unroll=False):
    config = dit.configure(
        *("Pi", 2),
        **{"input_size": (4, 4), "in_channels": 3, "num_classes": 5, "learn_sigma": False},
        **{"conditioning": conditioning, "conditions": ("t", "h", "y")},
    )
    key = jax.random.key(0)
    params = jax.tree.map(
        lambda x: x + 0.05 * jax.random.normal(key, x.shape), dit.init(config, key)
    )
    x, v = jax.random.normal(key, (2, 3, 4, 4, 3))
    t, r, y = jnp.array([0.3, 0.6, 1.0]), jnp.array([0.3, 0.1, 0.0]), jnp.array([1, 4, 5])
    apply = dit.make_apply(config, attention=name, remat=remat, unroll=unroll)

    def loss(params):
        def average(x, t):
            return apply(params, x, t=t, h=t - r, y=y)

        u, change = jax.jvp(average, (x, t), (v, jnp.ones_like(t)))
        target = v - (t - r)[:, None, None, None] * change
        return jnp.mean((u - jax.lax.stop_gradient(target)) ** 2)

    return jax.jit(jax.grad(loss))(params)


def assert_close(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        scale = max(1.0, float(np.abs(y).max()))
        np.testing.assert_allclose(x, y, atol=1e-6 * scale)


@pytest.mark.parametrize("conditioning, remat", CASES)
def test_gradients_are_those_of_plain_softmax(conditioning, remat):
    grads = gradient(conditioning, "xla_jvp", remat)
    assert float(np.abs(grads["blocks"]["attn"]["qkv"]["kernel"]).max()) > 1e-4
    assert_close(grads, gradient(conditioning, PLAIN))


@pytest.mark.slow
def test_blocks_may_be_compiled_separately():
    assert_close(gradient("adaln_zero", "xla_jvp", "full", True), gradient("adaln_zero", PLAIN))


def test_plain_attention_cannot_be_differentiated_forward(monkeypatch):
    """What `attend_forward` is for. When jax can, it may go."""
    monkeypatch.setitem(dit.fields.ARITHMETIC, "attention", ("xla",))
    with pytest.raises((TypeError, NotImplementedError), match="forward-mode|custom_lin"):
        gradient("adaln_zero", "xla")


def test_the_derivative_in_bfloat16_is_close_to_float32():
    config = dit.configure(
        *("Pi", 2),
        **{"input_size": (4, 4), "in_channels": 3, "num_classes": 5, "learn_sigma": False},
        conditions=("t", "h", "y"),
    )
    params, _ = random_run.draw(config)
    x, v = jax.random.normal(jax.random.key(0), (2, 3, 4, 4, 3))
    t, r, y = jnp.array([0.3, 0.6, 1.0]), jnp.array([0.3, 0.1, 0.0]), jnp.array([1, 4, 5])

    def derivative(dtype):
        apply = dit.make_apply(config, dtype=dtype, attention="xla_jvp")

        def average(x, t):
            return apply(params, x, t=t, h=t - r, y=y)

        return jax.jit(lambda: jax.jvp(average, (x, t), (v, jnp.ones_like(t))))()

    for half, full in zip(derivative("bfloat16"), derivative("float32"), strict=True):
        assert half.dtype == jnp.float32
        error = jnp.linalg.norm(half - full) / jnp.linalg.norm(full)
        assert 0 < error < 0.02  # bfloat16 has 8 bits: 2^-8 = 0.004, through all layers
