"""The common layers of a DiT, initialised as the official code does.

Shapes: N batch, H W grid (or any number of axes), C channels, p patch size, P = p*p*C patch,
T tokens (one for each patch), D hidden size.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

MLP_RATIO = 4
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}  # of the arithmetic
KEPT = "kept"  # marks the outputs of linears and of attention
REMAT_POLICIES = {  # what a block stores for the backward pass; none: everything
    "none": None,
    "dots": jax.checkpoint_policies.save_only_these_names(KEPT),
    "full": jax.checkpoint_policies.nothing_saveable,
}

xavier = nnx.initializers.xavier_uniform()
zeros = nnx.initializers.zeros
normal = nnx.initializers.normal(0.02)


def position_table(grid, hidden_size):
    """Fixed sinusoids, [sin, cos] for each axis of the grid of tokens, the last axis first.

    With a grid of (rows, columns) the first half of D encodes the column. (T, D) float32; if D is
    not divisible by twice the number of axes, the last features are 0.
    """
    count = hidden_size // (2 * len(grid))
    omega = 1 / 10_000 ** (np.arange(count, dtype=np.float64) / count)
    indices = np.meshgrid(*map(np.arange, grid), indexing="ij")
    angles = [np.outer(index.ravel(), omega) for index in reversed(indices)]
    waves = [wave(angle) for angle in angles for wave in (np.sin, np.cos)]
    table = np.concatenate(waves, axis=1).astype(np.float32)
    return np.pad(table, ((0, 0), (0, hidden_size - table.shape[1])))  # (T, D)


def patchify(x, p):
    """(N, H, W, C) -> (N, T, p*p*C), rows first; inside a patch the channel varies fastest."""
    n, *grid, c = x.shape
    x = x.reshape(n, *(size for extent in grid for size in (extent // p, p)), c)
    axes = range(1, x.ndim - 1)  # of (N, H/p, p, W/p, p, C)
    x = x.transpose(0, *axes[::2], *axes[1::2], x.ndim - 1)  # (N, H/p, W/p, p, p, C)
    return x.reshape(n, -1, p ** len(grid) * c)  # (N, T, P)


def unpatchify(x, p, grid):
    """(N, T, p*p*C) -> (N, H, W, C) with grid (H, W): the inverse of `patchify`."""
    rank = len(grid)
    x = x.reshape(len(x), *(extent // p for extent in grid), *(p,) * rank, -1)
    axes = (axis for i in range(1, rank + 1) for axis in (i, i + rank))
    x = x.transpose(0, *axes, x.ndim - 1)  # (N, H/p, p, W/p, p, C)
    return x.reshape(len(x), *grid, -1)  # (N, H, W, C)


def layer_norm(x):
    """LayerNorm without scale and bias; two-pass statistics over D in float32, in x's dtype."""
    y = x.astype(jnp.float32)
    y = y - y.mean(-1, keepdims=True)
    return (y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + 1e-6)).astype(x.dtype)


def modulate(x, shift, scale):
    return x * (1 + scale) + shift


class Linear(nnx.Linear):
    """Xavier uniform kernel and zero bias, as the official code initialises every linear."""

    def __init__(self, in_features, out_features, *, kernel_init=xavier, dtype, rngs):
        super().__init__(in_features, out_features, kernel_init=kernel_init, dtype=dtype, rngs=rngs)

    def __call__(self, x):
        return checkpoint_name(super().__call__(x), KEPT)


class JoinedLinear(nnx.LinearGeneral):
    """`count` linears D -> D in one kernel (D, count, D): (..., D) -> a list of (..., D).

    It is initialised as one linear of D to count * D. The outputs have an axis for `count`, so
    that tensor parallelism over D never divides a head.
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
    """A linear map of each patch, equal to the official convolution with stride p."""

    def __init__(self, patch_size, patch_features, hidden_size, *, dtype, rngs):
        self.patch_size = patch_size
        self.proj = Linear(patch_features, hidden_size, dtype=dtype, rngs=rngs)

    def __call__(self, x):
        return self.proj(patchify(x, self.patch_size))  # (N, T, D)


class Mlp(nnx.Module):
    def __init__(self, hidden_size, *, dtype, rngs):
        self.fc1 = Linear(hidden_size, MLP_RATIO * hidden_size, dtype=dtype, rngs=rngs)
        self.fc2 = Linear(MLP_RATIO * hidden_size, hidden_size, dtype=dtype, rngs=rngs)

    def __call__(self, x):
        return self.fc2(nnx.gelu(self.fc1(x), approximate=True))  # (N, T, D)


class FinalLayer(nnx.Module):
    """LayerNorm, adaptive in the adaLN designs (sec. 3.2), and a linear map that starts at 0."""

    def __init__(self, hidden_size, out_features, *, adaptive, dtype, rngs):
        options = {"kernel_init": zeros, "dtype": dtype, "rngs": rngs}
        self.adaptive = adaptive
        if adaptive:
            self.adaLN_modulation = Linear(hidden_size, 2 * hidden_size, **options)
        self.linear = Linear(hidden_size, out_features, **options)

    def __call__(self, x, c):
        """x (N, T, D); c (N, 1, D), the sum of the conditions -> (N, T, out_features)."""
        x = layer_norm(x)  # (N, T, D)
        if self.adaptive:
            shift, scale = jnp.split(self.adaLN_modulation(nnx.silu(c)), 2, axis=-1)
            x = modulate(x, shift, scale)
        return self.linear(x)  # (N, T, out_features)
