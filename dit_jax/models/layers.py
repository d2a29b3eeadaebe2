"""The common layers of a DiT, initialised as the official code does.

Shapes: N batch, H W grid (or any number of axes), C channels, p patch size, P = p*p*C patch,
T tokens (one for each patch), D hidden size, F width of an MLP.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from dit_jax.models.fields import mlp_width

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}  # of the arithmetic
KEPT = "kept"  # marks the outputs of linears and of attention
REMAT_POLICIES = {  # what a block stores for the backward pass; none: everything
    "none": None,
    "dots": jax.checkpoint_policies.save_only_these_names(KEPT),
    "full": jax.checkpoint_policies.nothing_saveable,
}


def rematerialise(run, name, *, prevent_cse):
    """run, storing for the backward pass what the name says in `REMAT_POLICIES`.

    prevent_cse: needed outside of a loop, where XLA would undo the rematerialisation.
    """
    if name == "none":
        return run
    return jax.checkpoint(run, policy=REMAT_POLICIES[name], prevent_cse=prevent_cse)


xavier = nnx.initializers.xavier_uniform()
zeros = nnx.initializers.zeros
normal = nnx.initializers.normal(0.02)


def fan_in(scale):
    """An initializer: normal numbers with the standard deviation scale / sqrt(inputs)."""
    return nnx.initializers.variance_scaling(scale**2, "fan_in", "normal")


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


class LayerNorm(nnx.Module):
    """`layer_norm`, which has no parameters."""

    def __init__(self, size, *, dtype, rngs):
        pass

    def __call__(self, x):
        return layer_norm(x)


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2)) times a weight for each of the last axis; in float32, in x's dtype.

    Zhang & Sennrich 2019, https://arxiv.org/abs/1910.07467.
    """

    def __init__(self, size, *, dtype, rngs):
        self.weight = nnx.Param(jnp.ones(size))

    def __call__(self, x):
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + 1e-6)
        weight = self.weight[...].astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))
        return (y * weight).astype(x.dtype)


NORMS = {"layer": LayerNorm, "rms": RMSNorm}  # each: norm(size, dtype=, rngs=)(x)


def modulate(x, shift, scale):
    return x * (1 + scale) + shift


def flat_product(x, kernel, dimensions, precision=None, **options):
    """`jax.lax.dot_general` of x (R, D) and a kernel (D, ...) as a product of two matrices."""
    assert dimensions == (((1,), (0,)), ((), ())), dimensions
    options = {name: each for name, each in options.items() if each is not None}
    matrix = kernel.reshape(len(kernel), -1)
    product = jax.lax.dot_general(x, matrix, dimensions, precision=precision, **options)
    return product.reshape(len(x), *kernel.shape[1:])


PRODUCTS = {"batched": jax.lax.dot_general, "flat": flat_product}  # of the linears of a block


def apply_linear(linear, apply, x):
    """apply(x) of a linear, (..., D) -> (..., F); with `flat_product`, of all rows as one matrix.

    XLA's program for CPUs is slower for arrays with more axes: N T rows in one matrix are 1.2 to
    1.9 times as fast as N matrices of T rows, and so are their gradients and that of the bias.
    """
    if linear.dot_general is not flat_product:
        return apply(x)
    y = apply(x.reshape(-1, x.shape[-1]))
    return y.reshape(*x.shape[:-1], *y.shape[1:])


class Linear(nnx.Linear):
    """Xavier uniform kernel and zero bias, as the official code initialises every linear.

    options: of `nnx.Linear`.
    """

    def __init__(self, in_features, out_features, *, kernel_init=xavier, **options):
        super().__init__(in_features, out_features, kernel_init=kernel_init, **options)

    def __call__(self, x):
        return checkpoint_name(apply_linear(self, super().__call__, x), KEPT)


class JoinedLinear(nnx.LinearGeneral):
    """`count` linears D -> F in one kernel (D, count, F): (..., D) -> a list of (..., F).

    It is initialised as one linear of D to count * F. The outputs have an axis for `count`, so
    that tensor parallelism over F never divides a head.
    """

    def __init__(self, hidden_size, count, out_features, *, kernel_init=xavier, **options):
        super().__init__(hidden_size, (count, out_features), kernel_init=kernel_init, **options)

    def __call__(self, x):
        joined = apply_linear(self, super().__call__, x)  # (..., count, F)
        parts = (joined[..., i, :] for i in range(joined.shape[-2]))
        return [checkpoint_name(part, KEPT) for part in parts]


class PatchEmbedder(nnx.Module):
    """A linear map of each patch, equal to the official convolution with stride p."""

    def __init__(self, patch_size, patch_features, hidden_size, *, dtype, rngs):
        self.patch_size = patch_size
        self.proj = Linear(patch_features, hidden_size, dtype=dtype, rngs=rngs)

    def __call__(self, x):
        return self.proj(patchify(x, self.patch_size))  # (N, T, D)


class BottleneckEmbedder(nnx.Module):
    """A linear map of each patch through `bottleneck` numbers, as JiT embeds its large patches.

    use_bias: of the first map; JiT's has none.
    """

    def __init__(self, patch_size, patch_features, hidden_size, *, bottleneck, use_bias, **options):
        self.patch_size = patch_size
        self.proj1 = Linear(patch_features, bottleneck, use_bias=use_bias, **options)
        self.proj2 = Linear(bottleneck, hidden_size, **options)

    def __call__(self, x):
        return self.proj2(self.proj1(patchify(x, self.patch_size)))  # (N, T, D)


def patch_embedder(bottleneck, *, use_bias=False):
    """The class of an embedder through so many numbers, or without a bottleneck if it is 0."""
    if not bottleneck:
        return PatchEmbedder
    return functools.partial(BottleneckEmbedder, bottleneck=bottleneck, use_bias=use_bias)


class Mlp(nnx.Module):
    """fc2(gelu(fc1(x))). options: of both linears."""

    def __init__(self, hidden_size, **options):
        width = mlp_width("gelu", hidden_size)
        self.fc1 = Linear(hidden_size, width, **options)
        self.fc2 = Linear(width, hidden_size, **options)

    def __call__(self, x):
        return self.fc2(nnx.gelu(self.fc1(x), approximate=True))  # (N, T, D)


class SwiGLU(nnx.Module):
    """fc2(silu(a) b) with a and b of fc1 (Shazeer 2020, https://arxiv.org/abs/2002.05202)."""

    def __init__(self, hidden_size, **options):
        width = mlp_width("swiglu", hidden_size)
        self.fc1 = JoinedLinear(hidden_size, 2, width, **options)
        self.fc2 = Linear(width, hidden_size, **options)

    def __call__(self, x):
        gate, value = self.fc1(x)  # each (N, T, F)
        return self.fc2(nnx.silu(gate) * value)  # (N, T, D)


MLPS = {"gelu": Mlp, "swiglu": SwiGLU}  # each: mlp(hidden_size, **options of Linear)(x)


class FinalLayer(nnx.Module):
    """A norm, adaptive in the adaLN designs (sec. 3.2), and a linear map that starts at 0."""

    def __init__(self, hidden_size, out_features, *, norm, adaptive, dtype, rngs):
        options = {"kernel_init": zeros, "dtype": dtype, "rngs": rngs}
        self.norm = NORMS[norm](hidden_size, dtype=dtype, rngs=rngs)
        self.adaptive = adaptive
        if adaptive:
            self.adaLN_modulation = Linear(hidden_size, 2 * hidden_size, **options)
        self.linear = Linear(hidden_size, out_features, **options)

    def __call__(self, x, c):
        """x (N, T, D); c (N, 1, D), the sum of the conditions -> (N, T, out_features)."""
        x = self.norm(x)  # (N, T, D)
        if self.adaptive:
            shift, scale = jnp.split(self.adaLN_modulation(nnx.silu(c)), 2, axis=-1)
            x = modulate(x, shift, scale)
        return self.linear(x)  # (N, T, out_features)
