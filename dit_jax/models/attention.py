"""Attention of a DiT: functions of queries, keys and values, chosen by name, and their layers.

Shapes: N batch, T tokens, S tokens that are attended to, D hidden size, K heads.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from dit_jax.models.layers import KEPT, JoinedLinear, Linear


@jax.custom_vjp
def attend(q, k, v):
    """softmax(q k / sqrt(D/K)) v, with the softmax in float32; all (N, T, K, D/K).

    The backward pass recomputes the weights from the log-sum-exp of the softmax (Dao et al. 2022,
    arXiv:2205.14135, algorithm 4), because reading (N, K, T, T) in float32 costs more.
    """
    return _attend(q, k, v)[0]


def _logits(q, k):
    logits = jnp.einsum("ntkd,nskd->nkts", q, k, preferred_element_type=jnp.float32)
    return logits * q.shape[-1] ** -0.5  # (N, K, T, T)


def _attend(q, k, v):
    logits = _logits(q, k)
    top = logits.max(-1, keepdims=True)  # (N, K, T, 1)
    weights = jnp.exp(logits - top)
    total = weights.sum(-1, keepdims=True)
    weights = (weights / total).astype(v.dtype)
    x = checkpoint_name(jnp.einsum("nkts,nskd->ntkd", weights, v), KEPT)  # (N, T, K, D/K)
    log_sum = checkpoint_name(top + jnp.log(total), KEPT)
    return x, (q, k, v, x, log_sum)


def _attend_backward(kept, d_x):
    q, k, v, x, log_sum = kept
    weights = jnp.exp(_logits(q, k) - log_sum).astype(v.dtype)  # (N, K, T, T)
    d_v = jnp.einsum("nkts,ntkd->nskd", weights, d_x)
    d_weights = jnp.einsum("ntkd,nskd->nkts", d_x, v, preferred_element_type=jnp.float32)
    mean = (d_x.astype(jnp.float32) * x.astype(jnp.float32)).sum(-1)  # (N, T, K)
    mean = mean.swapaxes(1, 2)[..., None]  # (N, K, T, 1)
    d_logits = weights.astype(jnp.float32) * (d_weights - mean) * q.shape[-1] ** -0.5
    d_logits = d_logits.astype(v.dtype)
    d_q = jnp.einsum("nkts,nskd->ntkd", d_logits, k)
    return d_q, jnp.einsum("nkts,ntkd->nskd", d_logits, q), d_v


attend.defvjp(_attend, _attend_backward)


@jax.custom_jvp
def attend_forward(q, k, v):
    """`attend` for a network that a loss differentiates forward, which has no rule for that.

    A jvp takes `_attend_forward`. A gradient of a loss that has a jvp inside still takes the
    backward pass of `attend`; a gradient without a jvp stores the weights, (N, K, T, T).
    """
    return attend(q, k, v)


@attend_forward.defjvp
def _attend_forward(primals, tangents):
    (q, k, v), (d_q, d_k, d_v) = primals, tangents
    weights = jax.nn.softmax(_logits(q, k))  # (N, K, T, T)
    d_logits = _logits(d_q, k) + _logits(q, d_k)
    d_weights = weights * (d_logits - (weights * d_logits).sum(-1, keepdims=True))
    parts = (d_weights, v), (weights, d_v)
    d_x = sum(jnp.einsum("nkts,nskd->ntkd", w.astype(v.dtype), values) for w, values in parts)
    # No stop_gradient: a loss that does not stop the derivative has right gradients too.
    return attend(q, k, v), d_x  # both (N, T, K, D/K)


def attend_fused(q, k, v, *, implementation):
    """The same by one of `jax.nn.dot_product_attention`'s implementations, "xla" or "cudnn"."""
    return checkpoint_name(
        jax.nn.dot_product_attention(q, k, v, implementation=implementation), KEPT
    )


ATTENTIONS = {
    "xla": attend,
    "xla_jvp": attend_forward,
    "cudnn": functools.partial(attend_fused, implementation="cudnn"),
}


class Attention(nnx.Module):
    """Multi-head self-attention over T. attention: a name in `ATTENTIONS`.

    A call with keeps_weights also leaves softmax(q k / sqrt(D/K)) in `weights`, (N, K, T, T)
    float32.
    """

    keeps_weights = False  # set on an instance

    def __init__(self, hidden_size, num_heads, *, dtype, attention, rngs):
        self.num_heads, self.attention = num_heads, attention
        self.qkv = JoinedLinear(hidden_size, 3, dtype=dtype, rngs=rngs)
        self.proj = Linear(hidden_size, hidden_size, dtype=dtype, rngs=rngs)

    def __call__(self, x):
        n, t, d = x.shape
        q, k, v = (part.reshape(n, t, self.num_heads, -1) for part in self.qkv(x))  # (N, T, K, D/K)
        if self.keeps_weights:
            self.weights = nnx.Intermediate(jax.nn.softmax(_logits(q, k)))  # (N, K, T, T)
        x = ATTENTIONS[self.attention](q, k, v)
        return self.proj(x.reshape(n, t, d))  # (N, T, D)


class CrossAttention(nnx.Module):
    """Multi-head attention from T tokens to the S tokens of the conditions."""

    def __init__(self, hidden_size, num_heads, *, dtype, rngs):
        self.num_heads = num_heads
        self.q = Linear(hidden_size, hidden_size, dtype=dtype, rngs=rngs)
        self.kv = JoinedLinear(hidden_size, 2, dtype=dtype, rngs=rngs)
        self.proj = Linear(hidden_size, hidden_size, dtype=dtype, rngs=rngs)

    def __call__(self, x, c):
        n, t, d = x.shape
        q = self.q(x).reshape(n, t, self.num_heads, -1)  # (N, T, K, D/K)
        k, v = (part.reshape(n, -1, self.num_heads, d // self.num_heads) for part in self.kv(c))
        x = attend_fused(q, k, v, implementation="xla")  # too few keys for cuDNN to pay
        return self.proj(x.reshape(n, t, d))  # (N, T, D)
