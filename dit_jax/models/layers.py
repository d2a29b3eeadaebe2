"""The parts of a DiT: embeddings, attention and MLP, initialised as the official code does.

Shapes: N batch, H W grid, C channels, p patch size, P = p*p*C patch, T = (H/p)(W/p) tokens,
D hidden size, K heads.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

FREQUENCIES = 256  # size of the sinusoidal embedding of t
MLP_RATIO = 4
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}  # of the arithmetic
ATTENTIONS = ("xla", "cudnn")  # implementations
KEPT = "kept"  # the name of what linears and attention give
REMAT_POLICIES = {  # what a block keeps for the backward pass; none: all, without recomputing
    "none": None,
    "dots": jax.checkpoint_policies.save_only_these_names(KEPT),
    "full": jax.checkpoint_policies.nothing_saveable,
}

xavier = nnx.initializers.xavier_uniform()
zeros = nnx.initializers.zeros
normal = nnx.initializers.normal(0.02)


def timestep_embedding(t):
    """Sinusoids of the step, [cos, sin], periods 2 pi to 2 pi * 10^4. t (N,) -> (N, 256)."""
    half = FREQUENCIES // 2
    frequencies = np.exp(-np.log(10_000) * np.arange(half) / half).astype(np.float32)
    angles = t[:, None].astype(jnp.float32) * frequencies[None]  # (N, 128)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)  # (N, 256)


def position_table(height, width, hidden_size):
    """Fixed 2-D sinusoids, [sin, cos]; the first half of D encodes the column. (T, D) float32."""
    quarter = hidden_size // 4
    omega = 1 / 10_000 ** (np.arange(quarter, dtype=np.float64) / quarter)
    row, column = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    angles = [np.outer(place.ravel(), omega) for place in (column, row)]  # 2 of (T, D/4)
    waves = [wave(angle) for angle in angles for wave in (np.sin, np.cos)]
    return np.concatenate(waves, axis=1).astype(np.float32)  # (T, D)


def patchify(x, p):
    """(N, H, W, C) -> (N, T, p*p*C), rows first, the channel fastest inside a patch."""
    n, h, w, c = x.shape
    x = x.reshape(n, h // p, p, w // p, p, c).swapaxes(2, 3)  # (N, H/p, W/p, p, p, C)
    return x.reshape(n, -1, p * p * c)  # (N, T, P)


def unpatchify(x, p, height, width):
    """(N, T, p*p*C) -> (N, H, W, C), the inverse of `patchify`."""
    x = x.reshape(x.shape[0], height // p, width // p, p, p, -1)  # (N, H/p, W/p, p, p, C)
    return x.swapaxes(2, 3).reshape(x.shape[0], height, width, -1)  # (N, H, W, C)


def layer_norm(x):
    """Without scale and bias; two-pass statistics over D in float32, result in x's dtype."""
    y = x.astype(jnp.float32)
    y = y - y.mean(-1, keepdims=True)
    return (y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + 1e-6)).astype(x.dtype)


def modulate(x, shift, scale):
    return x * (1 + scale) + shift


class Linear(nnx.Linear):
    """As the official code initialises every linear: Xavier uniform, bias 0."""

    def __init__(self, in_features, out_features, *, kernel_init=xavier, dtype, rngs):
        super().__init__(in_features, out_features, kernel_init=kernel_init, dtype=dtype, rngs=rngs)

    def __call__(self, x):
        return checkpoint_name(super().__call__(x), KEPT)


class JoinedLinear(nnx.LinearGeneral):
    """Several linears of D to D in one, born as one of D to count * D: (..., D) -> count (..., D).

    Their outputs have an axis of their own, so that a split of D keeps heads whole.
    """

    def __init__(self, hidden_size, count, *, dtype, rngs):
        super().__init__(
            hidden_size, (count, hidden_size), kernel_init=xavier, dtype=dtype, rngs=rngs
        )

    def __call__(self, x):
        joined = super().__call__(x)  # (..., count, D)
        parts = (joined[..., i, :] for i in range(joined.shape[-2]))
        return [checkpoint_name(part, KEPT) for part in parts]


class PatchEmbedder(nnx.Module):
    """A linear map of each patch; as a convolution its kernel would be (p, p, C, D)."""

    def __init__(self, patch_size, in_channels, hidden_size, *, dtype, rngs):
        self.patch_size = patch_size
        self.proj = Linear(patch_size**2 * in_channels, hidden_size, dtype=dtype, rngs=rngs)

    def __call__(self, x):
        return self.proj(patchify(x, self.patch_size))  # (N, T, D)


class TimestepEmbedder(nnx.Module):
    def __init__(self, hidden_size, *, dtype, rngs):
        options = {"kernel_init": normal, "dtype": dtype, "rngs": rngs}
        self.fc1 = Linear(FREQUENCIES, hidden_size, **options)
        self.fc2 = Linear(hidden_size, hidden_size, **options)

    def __call__(self, t):
        return self.fc2(nnx.silu(self.fc1(timestep_embedding(t))))  # (N, D)


class LabelEmbedder(nnx.Module):
    def __init__(self, num_labels, hidden_size, *, dtype, rngs):
        self.embedding_table = nnx.Embed(
            num_labels, hidden_size, embedding_init=normal, dtype=dtype, rngs=rngs
        )

    def __call__(self, y):
        return self.embedding_table(y)  # (N, D)


@jax.custom_vjp
def attend(q, k, v):
    """softmax(q k / sqrt(D/K)) v, the softmax in float32; all (N, T, K, D/K).

    The backward pass has the weights from the sums of the softmax again (Dao et al. 2022,
    arXiv:2205.14135, algorithm 4): (N, K, T, T) in float32 would be read time after time.
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


class Attention(nnx.Module):
    """Multi-head self-attention over T."""

    def __init__(self, hidden_size, num_heads, *, dtype, attention, rngs):
        self.num_heads, self.attention = num_heads, attention
        self.qkv = JoinedLinear(hidden_size, 3, dtype=dtype, rngs=rngs)
        self.proj = Linear(hidden_size, hidden_size, dtype=dtype, rngs=rngs)

    def __call__(self, x):
        n, t, d = x.shape
        q, k, v = (part.reshape(n, t, self.num_heads, -1) for part in self.qkv(x))  # (N, T, K, D/K)
        if self.attention == "xla":
            x = attend(q, k, v)
        else:
            x = jax.nn.dot_product_attention(q, k, v, implementation=self.attention)
        return self.proj(x.reshape(n, t, d))  # (N, T, D)


class CrossAttention(nnx.Module):
    """Multi-head attention from T tokens to a short memory."""

    def __init__(self, hidden_size, num_heads, *, dtype, rngs):
        self.num_heads = num_heads
        self.q = Linear(hidden_size, hidden_size, dtype=dtype, rngs=rngs)
        self.kv = JoinedLinear(hidden_size, 2, dtype=dtype, rngs=rngs)
        self.proj = Linear(hidden_size, hidden_size, dtype=dtype, rngs=rngs)

    def __call__(self, x, memory):
        n, t, d = x.shape
        q = self.q(x).reshape(n, t, self.num_heads, -1)  # (N, T, K, D/K)
        k, v = (
            part.reshape(n, -1, self.num_heads, d // self.num_heads) for part in self.kv(memory)
        )
        # Two keys are too few for a fused kernel: always XLA.
        x = jax.nn.dot_product_attention(q, k, v, implementation="xla")
        return self.proj(x.reshape(n, t, d))  # (N, T, D)


class Mlp(nnx.Module):
    def __init__(self, hidden_size, *, dtype, rngs):
        self.fc1 = Linear(hidden_size, MLP_RATIO * hidden_size, dtype=dtype, rngs=rngs)
        self.fc2 = Linear(MLP_RATIO * hidden_size, hidden_size, dtype=dtype, rngs=rngs)

    def __call__(self, x):
        return self.fc2(nnx.gelu(self.fc1(x), approximate=True))  # (N, T, D)


class FinalLayer(nnx.Module):
    """LayerNorm, adaptive for the adaLN designs (sec. 3.2); a linear map that starts at 0."""

    def __init__(self, hidden_size, out_features, *, adaptive, dtype, rngs):
        options = {"kernel_init": zeros, "dtype": dtype, "rngs": rngs}
        self.adaptive = adaptive
        if adaptive:
            self.adaLN_modulation = Linear(hidden_size, 2 * hidden_size, **options)
        self.linear = Linear(hidden_size, out_features, **options)

    def __call__(self, x, c):
        x = layer_norm(x)  # (N, T, D)
        if self.adaptive:
            c = nnx.silu(c.sum(axis=1, keepdims=True))  # (N, 1, D)
            shift, scale = jnp.split(self.adaLN_modulation(c), 2, axis=-1)
            x = modulate(x, shift, scale)
        return self.linear(x)  # (N, T, p*p*out_channels)
