"""Diffusion Transformer (DiT), Peebles & Xie 2023, https://arxiv.org/abs/2212.09748.

Shapes: N batch, H W grid, C channels, p patch size, T = (H/p)(W/p) tokens, D hidden size.
Arithmetic runs in `dtype` over float32 parameters; LayerNorm statistics, softmax and the output
are float32.
"""

import functools
from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx

from dit_jax.errors import UserError
from dit_jax.models import layers
from dit_jax.models.layers import DTYPES, REMAT_POLICIES, layer_norm, modulate

SIZES = {  # depth, hidden size, heads: table 1 of the paper; Ti is ours, for tiny images
    "Ti": (4, 128, 4),
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
}


class DiTConfig(NamedTuple):
    """All that the parameters depend on; how to compute with them is chosen apart (`DiT`)."""

    input_size: tuple[int, int]  # H, W
    patch_size: int
    in_channels: int
    depth: int
    hidden_size: int
    num_heads: int
    num_classes: int
    null_label: bool  # whether label `num_classes` exists and means "no label"
    learn_sigma: bool
    conditioning: str

    @classmethod
    def from_json(cls, fields):
        """The config whose `_asdict()` went through JSON, which has no tuples."""
        return cls(**fields | {"input_size": tuple(fields["input_size"])})

    @property
    def num_tokens(self):
        height, width = self.input_size
        return (height // self.patch_size) * (width // self.patch_size)

    @property
    def out_channels(self):
        """The noise, then, if it is learned, the variance code."""
        return (1 + self.learn_sigma) * self.in_channels


def configure(
    size,
    patch_size,
    *,
    input_size=(32, 32),
    in_channels=4,
    num_classes=1000,
    null_label=True,
    learn_sigma=True,
    conditioning="adaln_zero",
):
    """The DiTConfig of a size of `SIZES`; UserError where the fields do not fit together."""
    if size not in SIZES:
        raise UserError(f"size must be one of {', '.join(SIZES)}, got {size!r}")
    if conditioning not in BLOCKS:
        raise UserError(f"conditioning must be one of {', '.join(BLOCKS)}, got {conditioning!r}")
    if patch_size < 1:
        raise UserError(f"patch_size must be at least 1, got {patch_size}")
    if not _is_size(input_size):
        raise UserError(f"input_size must be two whole numbers of at least 1, got {input_size!r}")
    if any(extent % patch_size for extent in input_size):
        raise UserError(
            f"input_size must be divisible by patch_size {patch_size}, got {tuple(input_size)}"
        )
    for name, value in {"in_channels": in_channels, "num_classes": num_classes}.items():
        if value < 1:
            raise UserError(f"{name} must be at least 1, got {value}")
    image = tuple(input_size), patch_size, in_channels
    return DiTConfig(*image, *SIZES[size], num_classes, null_label, learn_sigma, conditioning)


def _is_size(size):
    is_pair = isinstance(size, (tuple, list)) and len(size) == 2
    return is_pair and all(isinstance(extent, int) and extent >= 1 for extent in size)


class InContextBlock(nnx.Module):
    """Attention and MLP; the condition comes as two more tokens of x (fig. 3)."""

    def __init__(self, hidden_size, num_heads, *, dtype, attention, rngs):
        options = {"dtype": dtype, "rngs": rngs}
        self.attn = layers.Attention(hidden_size, num_heads, attention=attention, **options)
        self.mlp = layers.Mlp(hidden_size, **options)

    def __call__(self, x, c):
        """x (N, T, D); c (N, 2, D), the embeddings of t and y -> (N, T, D). So every block."""
        x = x + self.attn(layer_norm(x))
        return x + self.mlp(layer_norm(x))


class CrossAttentionBlock(InContextBlock):
    """Attention, attention to the two condition tokens, and MLP."""

    def __init__(self, hidden_size, num_heads, *, dtype, attention, rngs):
        super().__init__(hidden_size, num_heads, dtype=dtype, attention=attention, rngs=rngs)
        self.cross_attn = layers.CrossAttention(hidden_size, num_heads, dtype=dtype, rngs=rngs)

    def __call__(self, x, c):
        x = x + self.attn(layer_norm(x))
        x = x + self.cross_attn(layer_norm(x), c)
        return x + self.mlp(layer_norm(x))


class AdaLNBlock(InContextBlock):
    """Attention and MLP, each shifted and scaled by the condition: c (N, 1, chunks, D)."""

    chunks = 4

    def __init__(self, hidden_size, num_heads, *, dtype, attention, rngs):
        super().__init__(hidden_size, num_heads, dtype=dtype, attention=attention, rngs=rngs)
        self.adaLN_modulation = layers.Linear(
            hidden_size, self.chunks * hidden_size, kernel_init=layers.zeros, dtype=dtype, rngs=rngs
        )

    def __call__(self, x, c):
        shift_msa, scale_msa, shift_mlp, scale_mlp = jnp.unstack(c, axis=2)  # (N, 1, D)
        x = x + self.attn(modulate(layer_norm(x), shift_msa, scale_msa))
        return x + self.mlp(modulate(layer_norm(x), shift_mlp, scale_mlp))


class AdaLNZeroBlock(AdaLNBlock):
    """As AdaLNBlock, each branch gated by the condition, every gate 0 at the start."""

    chunks = 6

    def __call__(self, x, c):
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = jnp.unstack(c, axis=2)
        x = x + gate_msa * self.attn(modulate(layer_norm(x), shift_msa, scale_msa))
        return x + gate_mlp * self.mlp(modulate(layer_norm(x), shift_mlp, scale_mlp))


BLOCKS = {
    "in_context": InContextBlock,
    "cross_attention": CrossAttentionBlock,
    "adaln": AdaLNBlock,
    "adaln_zero": AdaLNZeroBlock,
}


class DiT(nnx.Module):
    """x_t, t, y -> the noise in x_t and the code of the reverse step's variance.

    dtype: of the arithmetic. attention: "xla" or "cudnn". remat: one of `REMAT_POLICIES`.
    unroll: compile every block apart (slower to compile) instead of one block in a loop.
    gather: None, or gather(tree, dtype), which brings what is divided to its use, by names.
    """

    def __init__(self, config, *, dtype, attention, remat, unroll, gather, rngs):
        self.config, self.dtype = config, dtype
        self.remat, self.unroll, self.gather = remat, unroll, gather
        size, p, labels = config.hidden_size, config.patch_size, config.num_classes
        options = {"dtype": dtype, "rngs": rngs}
        self.x_embedder = layers.PatchEmbedder(p, config.in_channels, size, **options)
        self.t_embedder = layers.TimestepEmbedder(size, **options)
        self.y_embedder = layers.LabelEmbedder(labels + config.null_label, size, **options)

        @nnx.split_rngs(splits=config.depth)
        @nnx.vmap
        def stack(rngs):
            block = BLOCKS[config.conditioning]
            return block(size, config.num_heads, dtype=dtype, attention=attention, rngs=rngs)

        self.blocks = stack(rngs)
        options["adaptive"] = config.conditioning.startswith("adaln")
        self.final_layer = layers.FinalLayer(size, p * p * config.out_channels, **options)

    def bring(self, name, x):
        """An array, or a tree of parameters, where it is used."""
        return self.gather({name: x}, self.dtype)[name] if self.gather else x

    def modulations(self, c):
        """c (N, 2, D) -> (L, N, 1, chunks, D), of all L blocks: few rows for such large weights."""
        c = nnx.silu(c.sum(axis=1, keepdims=True))  # (N, 1, D)
        linear = nnx.vmap(lambda linear, c: linear(c), in_axes=(0, None))
        c = self.bring("modulation", linear(self.blocks.adaLN_modulation, c))  # (L, N, 1, F)
        return self.bring("chunks", c.reshape(*c.shape[:-1], -1, self.config.hidden_size))

    def __call__(self, x, t, y):
        """x (N, H, W, C), t (N,) steps, y (N,) labels -> (N, H, W, out_channels) float32."""
        config = self.config
        p, (height, width) = config.patch_size, config.input_size
        x = self.x_embedder(x)  # (N, T, D)
        table = layers.position_table(height // p, width // p, config.hidden_size)
        x = x + jnp.asarray(table, x.dtype)[None]
        c = jnp.stack([self.t_embedder(t), self.y_embedder(y)], axis=1)  # (N, 2, D)
        if config.conditioning == "in_context":
            x = jnp.concatenate([x, c], axis=1)  # (N, T+2, D)

        def run(block, x, c):
            graphdef, params = nnx.split(block)  # one block at a time
            params = self.bring("blocks", nnx.to_pure_dict(params))
            return nnx.merge(graphdef, params)(x, c)

        if self.remat != "none":
            # Inside a loop XLA cannot undo the rematerialisation by sharing its work.
            run = nnx.remat(run, policy=REMAT_POLICIES[self.remat], prevent_cse=self.unroll)
        adaptive = config.conditioning.startswith("adaln")
        conditions, axis = (self.modulations(c), 0) if adaptive else (c, None)
        unroll = config.depth if self.unroll else 1
        scan = nnx.scan(run, in_axes=(0, nnx.Carry, axis), out_axes=nnx.Carry, unroll=unroll)
        x = scan(self.blocks, x, conditions)
        x = self.final_layer(x[:, : config.num_tokens], c)  # (N, T, p*p*out_channels)
        return layers.unpatchify(x, p, height, width).astype(jnp.float32)


def init(config, key):
    """Random parameters: a nested dict of float32 arrays with the official names.

    The parameters of the blocks are stacked on a leading layer axis.
    """
    options = {"dtype": jnp.float32, "attention": "xla", "remat": "none", "rngs": nnx.Rngs(key)}
    model = DiT(config, unroll=False, gather=None, **options)
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def make_apply(
    config, *, dtype="float32", attention="xla", remat="none", unroll=False, gather=None
):
    """apply(params, x, t, y), the pure function of a `DiT` with these options."""
    choices = {"dtype": DTYPES, "attention": layers.ATTENTIONS, "remat": REMAT_POLICIES}
    for name, value in {"dtype": dtype, "attention": attention, "remat": remat}.items():
        if value not in choices[name]:
            raise UserError(f"{name} must be one of {', '.join(choices[name])}, got {value!r}")
    options = {"attention": attention, "remat": remat, "unroll": unroll, "gather": gather}
    make = functools.partial(DiT, config, dtype=DTYPES[dtype], **options)
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))))

    def apply(params, x, t, y):
        if gather:
            rest = {name: params[name] for name in params if name != "blocks"}
            params = params | gather(rest, DTYPES[dtype])
        return nnx.merge(graphdef, params)(x, t, y)

    return apply
