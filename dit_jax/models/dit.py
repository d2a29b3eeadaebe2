"""Diffusion Transformer (DiT), Peebles & Xie 2023, https://arxiv.org/abs/2212.09748.

Shapes: N batch, H W grid (or any number of axes), C channels, p patch size, T tokens, M tokens of
the conditions, L blocks, D hidden size. Arithmetic runs in `dtype` over float32 parameters; the
statistics of LayerNorm, the softmax and the output are float32.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from dit_jax.machine import prng
from dit_jax.models import conditions, fields, layers, routing, watched
from dit_jax.models.architecture import DiTConfig as DiTConfig
from dit_jax.models.architecture import configure as configure
from dit_jax.models.blocks import BLOCKS
from dit_jax.models.fields import SIZES as SIZES
from dit_jax.models.layers import DTYPES


class DiT(nnx.Module):
    """x and the conditions by name -> the prediction and the code of the reverse step's variance.

    dtype: of the arithmetic. attention: a name in `ATTENTIONS`. product: a name in `PRODUCTS`.
    remat: one of `REMAT_POLICIES`.
    unroll: compile every block separately (slower to compile) instead of one loop over them.
    gather(tree, dtype): all-gathers the sharded arrays of a tree, by their names, and casts them.
    watch: a call returns a `watched.Watched` too.

    With `velocity_head` the second half of the output's channels is a velocity. With `head_depth`
    it has that many blocks of its own, the last ones of the stack, and a final layer of its own;
    where only one half is used, the compiler leaves out the blocks of the other.
    """

    def __init__(self, config, *, dtype, attention, product, remat, unroll, gather, watch, rngs):
        self.config, self.dtype, self.product, self.watch = config, dtype, product, watch
        self.remat, self.unroll, self.gather = remat, unroll, gather
        size, options = config.hidden_size, {"dtype": dtype, "rngs": rngs}
        patch = config.patch_area * config.in_channels
        in_context_zero = config.conditioning == "in_context_zero"
        embed = layers.patch_embedder(config.bottleneck, use_bias=in_context_zero)
        self.x_embedder = embed(config.patch_size, patch, size, **options)
        self.conditions = tuple(each.name for each in conditions.of(config))
        for each in conditions.of(config):
            setattr(self, f"{each.name}_embedder", each.make(size, **options))

        @nnx.split_rngs(splits=config.num_blocks)
        @nnx.vmap
        def stack(rngs):
            block = BLOCKS[config.conditioning]
            return block(config, dtype=dtype, attention=attention, product=product, rngs=rngs)

        self.blocks = stack(rngs)
        out_features = config.patch_area * config.head_channels
        options |= {"norm": config.norm, "adaptive": config.adaptive}
        self.final_layer = layers.FinalLayer(size, out_features, **options)
        if config.head_depth:
            self.velocity_layer = layers.FinalLayer(size, out_features, **options)
        if config.class_tokens:
            self.class_tokens = nnx.Param(layers.normal(rngs.params(), (config.class_tokens, size)))
        if config.position == "learned_rope":
            tokens = config.num_tokens
            tokens += conditions.count_tokens(config) if config.in_context else 0
            self.position_table = nnx.Param(layers.normal(rngs.params(), (tokens, size)))

    def __call__(self, x, *, blocks=None, route=None, **given):
        """x (N, H, W, C), each condition (N, ...) by name -> (N, H, W, out_channels) float32.

        With `watch`, also a `Watched`. blocks(run, x): replaces the blocks, which are run(x), from
        tokens (N, T, D) to tokens; None: they are run. route: a `Routing` and its draw, or None.
        """
        config = self.config
        x = self.x_embedder(x)  # (N, T, D)
        embeddings = [getattr(self, f"{name}_embedder")(given[name]) for name in self.conditions]
        embeddings = [e if e.ndim == 3 else e[:, None] for e in embeddings]  # each (N, S, D)
        c = jnp.concatenate(embeddings, axis=1)  # (N, M, D)
        pooled = sum(e.mean(axis=1, keepdims=True) for e in embeddings)  # (N, 1, D)
        x, c = self.add_positions(x, c)
        joining = None
        if config.class_tokens:
            label = embeddings[self.conditions.index("y")].mean(axis=1, keepdims=True)  # (N, 1, D)
            joining = label + self.class_tokens[...].astype(x.dtype)[None]  # (N, S, D)

        def run(x):
            if config.in_context:
                x = jnp.concatenate([x, c], axis=1)  # (N, T+M, D)
            ends, seen = self.run_blocks(x, c, pooled, joining, route)
            return [end[:, : config.num_tokens] for end in ends], seen  # each (N, T, D)

        ends, seen = ([blocks(lambda x: run(x)[0][0], x)], None) if blocks else run(x)
        heads = (
            (self.final_layer, self.velocity_layer) if config.head_depth else (self.final_layer,)
        )
        patches = [head(end, pooled) for head, end in zip(heads, ends, strict=True)]
        out = [layers.unpatchify(x, config.patch_size, config.input_size) for x in patches]
        out = jnp.concatenate(out, axis=-1).astype(jnp.float32)
        return (out, seen) if self.watch else out

    def add_positions(self, x, c):
        """Tokens x (N, T, D) and c (N, M, D) of the conditions, with their vectors of the table."""
        config = self.config
        if config.position == "rope_1d":
            return x, c
        if config.position == "learned_rope":
            table = self.position_table[...].astype(x.dtype)[None]
            c = c + table[:, config.num_tokens :] if config.in_context else c
            return x + table[:, : config.num_tokens], c
        table = layers.position_table(config.token_grid, config.hidden_size)
        return x + jnp.asarray(table, x.dtype)[None], c

    def run_blocks(self, x, c, pooled, joining, route):
        """x (N, T, D), c (N, M, D), pooled (N, 1, D) -> [(N, T+S, D) of each head], in loops.

        joining: tokens (N, S, D) that join x before a later block, or None. The second result is
        the `Watched` of the blocks of the first head, None without `watch`.
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
            ends = [route[0].run(scan, x, route[1])]
        elif joining is not None:
            ends = [routing.join(scan, x, joining, first=self.config.class_tokens_from)]
        elif self.config.head_depth:
            ends = routing.branch(scan, x, self.config)
            seen.pop()
        else:
            ends = [scan(x)]
        return ends, watched.join(seen, ends[0]) if self.watch else None

    def modulations(self, params, pooled):
        """pooled (N, 1, D) -> the modulations of all blocks, (L, N, 1, chunks, D).

        The product is memory-bound: N rows are few beside the weights (L, D, chunks * D). So it is
        computed where the weights are, for all blocks at once, and only the result is sent.
        """
        c = nnx.silu(pooled)
        linear = nnx.graphdef(self.blocks.adaLN_modulation)
        is_flat = self.product == "flat"
        if is_flat:  # else XLA makes one product of all, for which a CPU transposes the weights
            c = jnp.broadcast_to(c, (self.config.num_blocks, *c.shape))  # (L, N, 1, D)
        apply = jax.vmap(
            lambda params, c: nnx.merge(linear, params)(c), (0, 0 if is_flat else None)
        )
        c = apply(params["adaLN_modulation"], c)  # (L, N, 1, chunks * D)
        c = self.gather({"modulation": c}, self.dtype)["modulation"]
        c = c.reshape(*c.shape[:-1], -1, self.config.hidden_size)  # (L, N, 1, chunks, D)
        return self.gather({"chunks": c}, self.dtype)["chunks"]


def init(config, key):
    """Random parameters: a nested dict of float32 arrays with the official names.

    The parameters of the blocks are stacked on a leading axis of layers.
    """
    options = {"dtype": jnp.float32, "attention": "xla", "product": "batched", "remat": "none"}
    options |= {"unroll": False, "watch": False, "rngs": nnx.Rngs(key)}
    model = DiT(config, gather=lambda tree, dtype: tree, **options)
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def make_apply(
    config,
    *,
    dtype="float32",
    attention="xla",
    product="batched",
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
    options = {"attention": attention, "product": product, "remat": remat, "unroll": unroll}
    options |= {"dtype": DTYPES[dtype], "gather": gather, "watch": watch}
    make = functools.partial(DiT, config, **options)
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(prng.key(0)))))

    def apply(params, x, **given):
        rest = {name: params[name] for name in params if name != "blocks"}
        params = params | gather(rest, DTYPES[dtype])
        return nnx.merge(graphdef, params)(x, **given)

    return apply
