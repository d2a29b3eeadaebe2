"""Diffusion Transformer (DiT), Peebles & Xie 2023, https://arxiv.org/abs/2212.09748.

Shapes: N batch, H W grid (or any number of axes), C channels, p patch size, T tokens, M tokens of
the conditions, L blocks, D hidden size. Arithmetic runs in `dtype` over float32 parameters; the
statistics of LayerNorm, the softmax and the output are float32.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dit_jax.machine import prng
from dit_jax.models import conditions, fields, layers
from dit_jax.models.blocks import BLOCKS
from dit_jax.models.fields import SIZES
from dit_jax.models.layers import DTYPES, REMAT_POLICIES


class DiTConfig(NamedTuple):
    """The architecture: everything that the parameters depend on."""

    input_size: tuple[int, ...]  # H, W; any number of axes
    patch_size: int
    in_channels: int
    depth: int
    hidden_size: int
    num_heads: int
    num_classes: int
    null_label: bool  # whether label `num_classes` exists and means "no label"
    learn_sigma: bool
    conditioning: str  # a name in `BLOCKS`

    @classmethod
    def from_json(cls, fields):
        """The config of an `_asdict()` that went through JSON, which has no tuples."""
        return cls(**fields | {"input_size": tuple(fields["input_size"])})

    @property
    def token_grid(self):
        """How many tokens there are along each axis."""
        return tuple(extent // self.patch_size for extent in self.input_size)

    @property
    def num_tokens(self):
        return math.prod(self.token_grid)

    @property
    def patch_area(self):
        """How many positions a patch covers: p * p on a grid of two axes."""
        return self.patch_size ** len(self.input_size)

    @property
    def out_channels(self):
        """The channels of the prediction and, if the variance is learned, as many of its code."""
        return (1 + self.learn_sigma) * self.in_channels

    @property
    def adaptive(self):
        """Whether the conditions enter through adaptive LayerNorm."""
        return self.conditioning.startswith("adaln")


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
    """The DiTConfig of a size in `SIZES`; UserError if the fields do not fit together."""
    fields.check(
        size=size,
        patch_size=patch_size,
        input_size=input_size,
        in_channels=in_channels,
        num_classes=num_classes,
        null_label=null_label,
        learn_sigma=learn_sigma,
        conditioning=conditioning,
    )
    image = tuple(input_size), patch_size, in_channels
    return DiTConfig(*image, *SIZES[size], num_classes, null_label, learn_sigma, conditioning)


class Watched(NamedTuple):
    """What happens inside the blocks of a DiT. In-context, T counts the M tokens too.

    x (L+1, N, T, D): the tokens before the first block and after each. attention (L, N, K, T, T)
    float32: the weights of each block, from a token in the last axis but one to all tokens.
    """

    x: jax.Array
    attention: jax.Array


class DiT(nnx.Module):
    """x and the conditions by name -> the prediction and the code of the reverse step's variance.

    dtype: of the arithmetic. attention: a name in `ATTENTIONS`. remat: one of `REMAT_POLICIES`.
    unroll: compile every block separately (slower to compile) instead of one loop over them.
    gather(tree, dtype): all-gathers the sharded arrays of a tree, by their names, and casts them.
    watch: a call returns a `Watched` too.
    """

    def __init__(self, config, *, dtype, attention, remat, unroll, gather, watch, rngs):
        self.config, self.dtype, self.watch = config, dtype, watch
        self.remat, self.unroll, self.gather = remat, unroll, gather
        size, options = config.hidden_size, {"dtype": dtype, "rngs": rngs}
        patch = config.patch_area * config.in_channels
        self.x_embedder = layers.PatchEmbedder(config.patch_size, patch, size, **options)
        self.conditions = tuple(each.name for each in conditions.of(config))
        for each in conditions.of(config):
            setattr(self, f"{each.name}_embedder", each.make(size, **options))

        @nnx.split_rngs(splits=config.depth)
        @nnx.vmap
        def stack(rngs):
            block = BLOCKS[config.conditioning]
            return block(size, config.num_heads, dtype=dtype, attention=attention, rngs=rngs)

        self.blocks = stack(rngs)
        out_features = config.patch_area * config.out_channels
        self.final_layer = layers.FinalLayer(
            size, out_features, adaptive=config.adaptive, **options
        )

    def __call__(self, x, *, blocks=None, **given):
        """x (N, H, W, C), each condition (N, ...) by name -> (N, H, W, out_channels) float32.

        With `watch`, the result is that and a `Watched`. blocks(run, x): replaces the blocks, which
        are run(x), from tokens (N, T, D) to tokens (N, T, D); None: they are run.
        """
        config = self.config
        x = self.x_embedder(x)  # (N, T, D)
        table = layers.position_table(config.token_grid, config.hidden_size)
        x = x + jnp.asarray(table, x.dtype)[None]
        embeddings = [getattr(self, f"{name}_embedder")(given[name]) for name in self.conditions]
        embeddings = [e if e.ndim == 3 else e[:, None] for e in embeddings]  # each (N, S, D)
        c = jnp.concatenate(embeddings, axis=1)  # (N, M, D)
        pooled = sum(e.mean(axis=1, keepdims=True) for e in embeddings)  # (N, 1, D)

        def run(x):
            if config.conditioning == "in_context":
                x = jnp.concatenate([x, c], axis=1)  # (N, T+M, D)
            x, watched = self.run_blocks(x, c, pooled)
            return x[:, : config.num_tokens], watched  # (N, T, D)

        x, watched = (blocks(lambda x: run(x)[0], x), None) if blocks else run(x)
        x = self.final_layer(x, pooled)  # (N, T, p*p*out_channels)
        x = layers.unpatchify(x, config.patch_size, config.input_size).astype(jnp.float32)
        return (x, watched) if self.watch else x

    def run_blocks(self, x, c, pooled):
        """x (N, T, D), c (N, M, D), pooled (N, 1, D) -> (N, T, D), in one loop over the blocks.

        The second result is the `Watched` of them, None without `watch`.
        """
        graphdef, params = nnx.split(self.blocks)
        params = nnx.to_pure_dict(params)  # each (L, ...)
        modulations = self.modulations(params, pooled) if self.config.adaptive else None

        def run(x, layer):
            params, modulation = layer
            block = nnx.merge(graphdef, self.gather({"blocks": params}, self.dtype)["blocks"])
            block.attn.keeps_weights = self.watch
            after = block(x, c if modulation is None else modulation)
            return after, (x, block.attn.weights[...]) if self.watch else None

        if self.remat != "none":
            # In a loop XLA cannot undo the rematerialisation, so CSE need not be prevented.
            policy = REMAT_POLICIES[self.remat]
            run = jax.checkpoint(run, policy=policy, prevent_cse=self.unroll)
        unroll = self.config.depth if self.unroll else 1
        x, kept = jax.lax.scan(run, x, (params, modulations), unroll=unroll)
        if not self.watch:
            return x, None
        before, weights = kept
        return x, Watched(jnp.concatenate([before, x[None]]), weights)  # (L+1, N, T, D)

    def modulations(self, params, pooled):
        """pooled (N, 1, D) -> the modulations of all blocks, (L, N, 1, chunks, D).

        The product is memory-bound: N rows are few beside the weights (L, D, chunks * D). So it is
        computed where the weights are, for all blocks at once, and only the result is sent.
        """
        c = nnx.silu(pooled)
        linear = nnx.graphdef(self.blocks.adaLN_modulation)
        apply = jax.vmap(lambda params: nnx.merge(linear, params)(c))
        c = apply(params["adaLN_modulation"])  # (L, N, 1, chunks * D)
        c = self.gather({"modulation": c}, self.dtype)["modulation"]
        c = c.reshape(*c.shape[:-1], -1, self.config.hidden_size)  # (L, N, 1, chunks, D)
        return self.gather({"chunks": c}, self.dtype)["chunks"]


def init(config, key):
    """Random parameters: a nested dict of float32 arrays with the official names.

    The parameters of the blocks are stacked on a leading axis of layers.
    """
    options = {"dtype": jnp.float32, "attention": "xla", "remat": "none", "rngs": nnx.Rngs(key)}
    model = DiT(config, unroll=False, gather=_keep, watch=False, **options)
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def make_apply(
    config,
    *,
    dtype="float32",
    attention="xla",
    remat="none",
    unroll=False,
    gather=None,
    watch=False,
):
    """apply(params, x, t=..., y=..., blocks=None), the pure function of a `DiT` with these options.

    gather: None where no parameter is sharded, else as in `DiT`. watch: apply returns its result
    and a `Watched`. UserError for an unknown name.
    """
    fields.check_arithmetic(dtype=dtype, attention=attention, remat=remat)
    gather = gather or _keep
    options = {"attention": attention, "remat": remat, "unroll": unroll, "gather": gather}
    options["watch"] = watch
    make = functools.partial(DiT, config, dtype=DTYPES[dtype], **options)
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(prng.key(0)))))

    def apply(params, x, **given):
        rest = {name: params[name] for name in params if name != "blocks"}
        params = params | gather(rest, DTYPES[dtype])
        return nnx.merge(graphdef, params)(x, **given)

    return apply


def _keep(tree, dtype):
    """What `gather` does where nothing is sharded."""
    return tree
