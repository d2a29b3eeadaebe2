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

from dit_jax import settings
from dit_jax.machine import prng
from dit_jax.models import conditions, fields, layers, routing, watched
from dit_jax.models.blocks import BLOCKS
from dit_jax.models.fields import SIZES
from dit_jax.models.layers import DTYPES


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
    conditions: tuple[str, ...] = ("t", "y")  # names in `conditions.of`
    velocity_head: bool = False  # whether it gives a velocity beside the average velocity
    norm: str = "layer"  # a name in `layers.NORMS`
    mlp: str = "gelu"  # a name in `layers.MLPS`
    position: str = "sincos"  # or "rope": attention also rotates by the position
    qk_norm: bool = False  # RMSNorm of queries and keys
    bottleneck: int = 0  # numbers of a patch before D; 0: from p*p*C to D at once
    class_tokens: int = 0  # tokens of the label that join the others, without a position
    class_tokens_from: int = 0  # before this block

    @classmethod
    def from_json(cls, fields):
        """The config of an `_asdict()` that went through JSON, which has no tuples."""
        names = ("input_size", "conditions")
        return cls(**fields | {name: tuple(fields[name]) for name in names if name in fields})

    def to_json(self):
        """The fields without those that have their default, so that older code can read them."""
        usual, none = self._field_defaults, object()
        return {name: x for name, x in self._asdict().items() if x != usual.get(name, none)}

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
        """Of the prediction and, if there is one, of the variance's code or the velocity head."""
        return (1 + self.learn_sigma + self.velocity_head) * self.in_channels

    @property
    def parts(self):
        """{field: value} of what is not as in the paper's DiT."""
        defaults = self._field_defaults.items()
        return {name: getattr(self, name) for name, x in defaults if getattr(self, name) != x}

    @property
    def adaptive(self):
        """Whether the conditions enter through adaptive LayerNorm."""
        return self.conditioning.startswith("adaln")


def configure(size, patch_size, **more):
    """The DiTConfig of a size in `SIZES` and other fields of a `settings.Model`, else UserError."""
    model = settings.Model(size=size, patch_size=patch_size, **more)
    fields.check(model)
    given = dict(zip(("depth", "hidden_size", "num_heads"), SIZES[size], strict=True))
    given |= {name: x for name, x in vars(model).items() if name != "size"}
    return DiTConfig.from_json(given)


class DiT(nnx.Module):
    """x and the conditions by name -> the prediction and the code of the reverse step's variance.

    dtype: of the arithmetic. attention: a name in `ATTENTIONS`. remat: one of `REMAT_POLICIES`.
    unroll: compile every block separately (slower to compile) instead of one loop over them.
    gather(tree, dtype): all-gathers the sharded arrays of a tree, by their names, and casts them.
    watch: a call returns a `watched.Watched` too.
    """

    def __init__(self, config, *, dtype, attention, remat, unroll, gather, watch, rngs):
        self.config, self.dtype, self.watch = config, dtype, watch
        self.remat, self.unroll, self.gather = remat, unroll, gather
        size, options = config.hidden_size, {"dtype": dtype, "rngs": rngs}
        patch = config.patch_area * config.in_channels
        embed = layers.patch_embedder(config.bottleneck)
        self.x_embedder = embed(config.patch_size, patch, size, **options)
        self.conditions = tuple(each.name for each in conditions.of(config))
        for each in conditions.of(config):
            setattr(self, f"{each.name}_embedder", each.make(size, **options))

        @nnx.split_rngs(splits=config.depth)
        @nnx.vmap
        def stack(rngs):
            block = BLOCKS[config.conditioning]
            return block(config, dtype=dtype, attention=attention, rngs=rngs)

        self.blocks = stack(rngs)
        out_features = config.patch_area * config.out_channels
        options |= {"norm": config.norm, "adaptive": config.adaptive}
        self.final_layer = layers.FinalLayer(size, out_features, **options)
        if config.class_tokens:
            self.class_tokens = nnx.Param(layers.normal(rngs.params(), (config.class_tokens, size)))

    def __call__(self, x, *, blocks=None, route=None, **given):
        """x (N, H, W, C), each condition (N, ...) by name -> (N, H, W, out_channels) float32.

        With `watch`, also a `Watched`. blocks(run, x): replaces the blocks, which are run(x), from
        tokens (N, T, D) to tokens; None: they are run. route: a `Routing` and its draw, or None.
        """
        config = self.config
        x = self.x_embedder(x)  # (N, T, D)
        table = layers.position_table(config.token_grid, config.hidden_size)
        x = x + jnp.asarray(table, x.dtype)[None]
        embeddings = [getattr(self, f"{name}_embedder")(given[name]) for name in self.conditions]
        embeddings = [e if e.ndim == 3 else e[:, None] for e in embeddings]  # each (N, S, D)
        c = jnp.concatenate(embeddings, axis=1)  # (N, M, D)
        pooled = sum(e.mean(axis=1, keepdims=True) for e in embeddings)  # (N, 1, D)
        joining = None
        if config.class_tokens:
            label = embeddings[self.conditions.index("y")]  # (N, 1, D)
            joining = label + self.class_tokens[...].astype(x.dtype)[None]  # (N, S, D)

        def run(x):
            if config.conditioning == "in_context":
                x = jnp.concatenate([x, c], axis=1)  # (N, T+M, D)
            x, seen = self.run_blocks(x, c, pooled, joining, route)
            return x[:, : config.num_tokens], seen  # (N, T, D)

        x, seen = (blocks(lambda x: run(x)[0], x), None) if blocks else run(x)
        x = self.final_layer(x, pooled)  # (N, T, p*p*out_channels)
        x = layers.unpatchify(x, config.patch_size, config.input_size).astype(jnp.float32)
        return (x, seen) if self.watch else x

    def run_blocks(self, x, c, pooled, joining, route):
        """x (N, T, D), c (N, M, D), pooled (N, 1, D) -> (N, T+S, D), in a loop over the blocks.

        joining: tokens (N, S, D) that join x before a later block, or None. The second result is
        the `Watched` of the blocks, None without `watch`.
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

        run = layers.rematerialise(run, self.remat, prevent_cse=self.unroll)
        stack, seen = (params, modulations), []

        def scan(x, i=0, j=None):
            part = stack if (i, j) == (0, None) else jax.tree.map(lambda y: y[i:j], stack)
            x, each = jax.lax.scan(run, x, part, unroll=self.unroll)
            seen.append(each)
            return x

        if route is not None:
            x = route[0].run(scan, x, route[1])
        elif joining is not None:
            x = routing.join(scan, x, joining, first=self.config.class_tokens_from)
        else:
            x = scan(x)
        return x, watched.join(seen, x) if self.watch else None

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
    model = DiT(config, unroll=False, gather=lambda tree, dtype: tree, watch=False, **options)
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
    forward=False,
):
    """apply(params, x, t=..., y=..., blocks=None), the pure function of a `DiT` with these options.

    gather: None where no parameter is sharded, else as in `DiT`. watch: apply returns its result
    and a `Watched`. forward: a loss may take a jvp of it. UserError for an unknown name.
    """
    fields.check_arithmetic(dtype=dtype, attention=attention, remat=remat)
    if forward:
        fields.check_forward(attention)
        attention = "xla_jvp"
    gather = gather or (lambda tree, dtype: tree)
    options = {"attention": attention, "remat": remat, "unroll": unroll, "watch": watch}
    make = functools.partial(DiT, config, dtype=DTYPES[dtype], gather=gather, **options)
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(prng.key(0)))))

    def apply(params, x, **given):
        rest = {name: params[name] for name in params if name != "blocks"}
        params = params | gather(rest, DTYPES[dtype])
        return nnx.merge(graphdef, params)(x, **given)

    return apply
