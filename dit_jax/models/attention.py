"""Attention of a DiT: functions of queries, keys and values, chosen by name, and their layers.

Shapes: N batch, T tokens, S tokens that are attended to, D hidden size, K heads.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from dit_jax.models.layers import KEPT, JoinedLinear, Linear, RMSNorm

THETA = 10_000  # of RoPE


@jax.custom_vjp
def attend(q, k, v):
    """softmax(q k / sqrt(D/K)) v, with the softmax in float32; all (N, T, K, D/K).

    The backward pass recomputes the weights from the log-sum-exp of the softmax (Dao et al. 2022,
    arXiv:2205.14135, algorithm 4), because reading (N, K, T, T) in float32 costs more.
    """
    # Without a gradient, as in sampling, the TPU compiler expects `_attend_saving` to be slower.
    weights = jax.nn.softmax(_logits(q, k)).astype(v.dtype)  # (N, K, T, T)
    return jnp.einsum("nkts,nskd->ntkd", weights, v)  # (N, T, K, D/K)


def _logits(q, k):
    logits = jnp.einsum("ntkd,nskd->nkts", q, k, preferred_element_type=jnp.float32)
    return logits * q.shape[-1] ** -0.5  # (N, K, T, T)


def _attend_saving(q, k, v):
    """(the result, what the backward pass needs)."""
    logits = _logits(q, k)
    top = logits.max(-1, keepdims=True)  # (N, K, T, 1)
    weights = jnp.exp(logits - top).astype(v.dtype)
    # A column of ones in v gives the sum of the weights: one pass over (N, K, T, T) less.
    ones = jnp.ones((*v.shape[:-1], 1), v.dtype)
    joined = jnp.concatenate([v, ones], axis=-1)  # (N, T, K, D/K+1)
    joined = jnp.einsum("nkts,nskd->ntkd", weights, joined, preferred_element_type=jnp.float32)
    total = joined[..., -1:]  # (N, T, K, 1)
    x = checkpoint_name((joined[..., :-1] / total).astype(v.dtype), KEPT)  # (N, T, K, D/K)
    log_sum = checkpoint_name(top + jnp.log(total.swapaxes(1, 2)), KEPT)  # (N, K, T, 1)
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


attend.defvjp(_attend_saving, _attend_backward)


@jax.custom_jvp
def attend_forward(q, k, v):
    """The same as `attend`, which has no jvp, for losses that take a jvp of the network.

    `_attend_jvp` computes the jvp. The gradient of a loss with a jvp takes the backward pass of
    `attend`; without a jvp in the loss, it stores the weights, (N, K, T, T).
    """
    return attend(q, k, v)


@attend_forward.defjvp
def _attend_jvp(primals, tangents):
    (q, k, v), (d_q, d_k, d_v) = primals, tangents
    weights = jax.nn.softmax(_logits(q, k))  # (N, K, T, T)
    d_logits = _logits(d_q, k) + _logits(q, d_k)  # (N, K, T, T)
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


def rotation_angles(grid, head_size):
    """The angles of RoPE (Su et al. 2021, https://arxiv.org/abs/2104.09864): (T, D/K/2) float64.

    With G axes of the grid, each turns its D/K/2G pairs of numbers, the first axis first, by its
    index times THETA^(-i / pairs). Pairs that are left over are not turned.
    """
    pairs = head_size // (2 * len(grid))
    omega = THETA ** (-np.arange(pairs) / pairs)
    indices = np.meshgrid(*map(np.arange, grid), indexing="ij")
    angles = np.concatenate([np.outer(index.ravel(), omega) for index in indices], axis=1)
    return np.pad(angles, ((0, 0), (0, head_size // 2 - angles.shape[1])))


def rotate(x, grid, *, rotates_all=False):
    """Turns each pair of neighbours in x (N, T, K, D/K) by `rotation_angles`; in x's dtype.

    q and k of two tokens then have a product that depends on the difference of their positions.
    Tokens after those of the grid have no position and are not turned. With rotates_all, on a grid
    of one axis, they are: their positions are the last ones before those of the grid, -1 the last.
    """
    angles = rotation_angles(grid, x.shape[-1])
    others = x.shape[1] - len(angles)
    if rotates_all:
        before = np.arange(-others, 0)[:, None]  # the angles of position 1 times the position
        rates = rotation_angles((2,), x.shape[-1])[1:]
        angles = np.concatenate([angles, before * rates])[None, :, None]
    else:
        angles = np.pad(angles, ((0, others), (0, 0)))[None, :, None]
    cos, sin = (jnp.asarray(wave(angles), jnp.float32) for wave in (np.cos, np.sin))
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    a, b = pairs[..., 0], pairs[..., 1]  # (N, T, K, D/K/2)
    pairs = jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=-1)
    return pairs.reshape(x.shape).astype(x.dtype)


class Attention(nnx.Module):
    """Multi-head self-attention over T. attention: a name in `ATTENTIONS`.

    grid, rotates_all: of the tokens whose q and k RoPE turns by their position, see `rotate`; a
    grid of None: it turns none. qk_norm: q and k of each head go through an RMSNorm first (Henry
    et al. 2020, arXiv:2010.04245). linear: of `Linear`, for all its linears.

    A call with keeps_weights also leaves softmax(q k / sqrt(D/K)) in `weights`, (N, K, T, T)
    float32.
    """

    keeps_weights = False  # set on an instance

    def __init__(
        self,
        hidden_size,
        num_heads,
        *,
        grid=None,
        rotates_all=False,
        qk_norm=False,
        attention,
        **linear,
    ):
        self.num_heads, self.attention = num_heads, attention
        self.grid, self.rotates_all, self.qk_norm = grid, rotates_all, qk_norm
        self.qkv = JoinedLinear(hidden_size, 3, hidden_size, **linear)
        self.proj = Linear(hidden_size, hidden_size, **linear)
        if qk_norm:
            options = {name: linear[name] for name in ("dtype", "rngs")}
            self.q_norm = RMSNorm(hidden_size // num_heads, **options)
            self.k_norm = RMSNorm(hidden_size // num_heads, **options)

    def __call__(self, x):
        n, t, d = x.shape
        q, k, v = (part.reshape(n, t, self.num_heads, -1) for part in self.qkv(x))  # (N, T, K, D/K)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.grid:
            q, k = (rotate(each, self.grid, rotates_all=self.rotates_all) for each in (q, k))
        if self.keeps_weights:
            self.weights = nnx.Intermediate(jax.nn.softmax(_logits(q, k)))  # (N, K, T, T)
        with jax.named_scope("attention"):
            x = ATTENTIONS[self.attention](q, k, v)
        return self.proj(x.reshape(n, t, d))  # (N, T, D)


class CrossAttention(nnx.Module):
    """Multi-head attention from T tokens to the S tokens of the conditions."""

    def __init__(self, hidden_size, num_heads, **linear):
        self.num_heads = num_heads
        self.q = Linear(hidden_size, hidden_size, **linear)
        self.kv = JoinedLinear(hidden_size, 2, hidden_size, **linear)
        self.proj = Linear(hidden_size, hidden_size, **linear)

    def __call__(self, x, c):
        n, t, d = x.shape
        q = self.q(x).reshape(n, t, self.num_heads, -1)  # (N, T, K, D/K)
        k, v = (part.reshape(n, -1, self.num_heads, d // self.num_heads) for part in self.kv(c))
        x = attend_fused(q, k, v, implementation="xla")  # too few keys for cuDNN to pay
        return self.proj(x.reshape(n, t, d))  # (N, T, D)
