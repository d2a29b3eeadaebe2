"""The designs of a DiT block: how the conditions enter it; four of Peebles & Xie 2023, fig. 3.

Shapes: N batch, T tokens, M tokens of the conditions, D hidden size. Every block maps x (N, T, D)
to (N, T, D). Beside x, the adaLN blocks take modulations (N, 1, chunks, D), and the others the
embeddings of the conditions (N, M, D). A block is made of parts, which a DiTConfig names: a norm of
`NORMS` before each branch, self-attention with or without RoPE and qk_norm, and an MLP of `MLPS`.
product: a name in `PRODUCTS`, for the linears of both branches.
"""

import jax.numpy as jnp
from flax import nnx

from dit_jax.models.attention import Attention, CrossAttention
from dit_jax.models.layers import MLPS, NORMS, PRODUCTS, Linear, fan_in, modulate, zeros


class InContextBlock(nnx.Module):
    """Attention and MLP. The conditions are tokens of x already, so c is not used."""

    linears = {}  # options of the linears of both branches

    def __init__(self, config, *, dtype, attention, product, rngs):
        size, options = config.hidden_size, {"dtype": dtype, "rngs": rngs}
        linears = self.linears | {"dot_general": PRODUCTS[product]}
        self.norm1 = NORMS[config.norm](size, **options)
        self.attn = Attention(
            *(size, config.num_heads),
            grid=config.rotated_grid,
            rotates_all=config.position == "rope_1d",
            qk_norm=config.qk_norm,
            attention=attention,
            **linears,
            **options,
        )
        self.norm2 = NORMS[config.norm](size, **options)
        self.mlp = MLPS[config.mlp](size, **linears, **options)

    def __call__(self, x, c):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class InContextZeroBlock(InContextBlock):
    """As InContextBlock without biases; each branch has a learned gate (D,), 0 at the start.

    Of improved MeanFlow (Geng et al. 2025, https://arxiv.org/abs/2512.02012).
    """

    linears = {"kernel_init": fan_in(0.32), "use_bias": False}

    def __init__(self, config, **options):
        super().__init__(config, **options)
        self.gate_msa = nnx.Param(jnp.zeros(config.hidden_size))
        self.gate_mlp = nnx.Param(jnp.zeros(config.hidden_size))

    def __call__(self, x, c):
        gate_msa, gate_mlp = (
            gate[...].astype(x.dtype)[None, None] for gate in (self.gate_msa, self.gate_mlp)
        )
        x = x + gate_msa * self.attn(self.norm1(x))
        return x + gate_mlp * self.mlp(self.norm2(x))


class CrossAttentionBlock(InContextBlock):
    """Attention, cross-attention to the conditions c (N, M, D), and MLP."""

    def __init__(self, config, *, dtype, product, rngs, **more):
        super().__init__(config, dtype=dtype, product=product, rngs=rngs, **more)
        size, options = config.hidden_size, {"dtype": dtype, "rngs": rngs}
        self.norm_cross = NORMS[config.norm](size, **options)
        options["dot_general"] = PRODUCTS[product]
        self.cross_attn = CrossAttention(size, config.num_heads, **options)

    def __call__(self, x, c):
        x = x + self.attn(self.norm1(x))
        x = x + self.cross_attn(self.norm_cross(x), c)
        return x + self.mlp(self.norm2(x))


class AdaLNBlock(InContextBlock):
    """Attention and MLP, each shifted and scaled by its modulations (N, 1, 4, D)."""

    chunks = 4

    def __init__(self, config, *, dtype, rngs, **more):
        super().__init__(config, dtype=dtype, rngs=rngs, **more)
        size = config.hidden_size
        self.adaLN_modulation = Linear(  # applied by the DiT, for all its blocks at once
            size, self.chunks * size, kernel_init=zeros, dtype=dtype, rngs=rngs
        )

    def __call__(self, x, modulations):
        shift_msa, scale_msa, shift_mlp, scale_mlp = jnp.unstack(modulations, axis=2)  # (N, 1, D)
        x = x + self.attn(modulate(self.norm1(x), shift_msa, scale_msa))
        return x + self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


class AdaLNZeroBlock(AdaLNBlock):
    """As AdaLNBlock, and each branch is gated (N, 1, 6, D); every gate is 0 at the start."""

    chunks = 6

    def __call__(self, x, modulations):
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = jnp.unstack(
            modulations, axis=2
        )
        x = x + gate_msa * self.attn(modulate(self.norm1(x), shift_msa, scale_msa))
        return x + gate_mlp * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


BLOCKS = {
    "in_context": InContextBlock,
    "in_context_zero": InContextZeroBlock,
    "cross_attention": CrossAttentionBlock,
    "adaln": AdaLNBlock,
    "adaln_zero": AdaLNZeroBlock,
}
