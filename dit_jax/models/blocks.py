"""The four designs of a DiT block (Peebles & Xie 2023, fig. 3): how the conditions enter it.

Shapes: N batch, T tokens, M tokens of the conditions, D hidden size. Every block maps x (N, T, D)
to (N, T, D). Beside x, the adaLN blocks take modulations (N, 1, chunks, D), and the others the
embeddings of the conditions (N, M, D).
"""

import jax.numpy as jnp
from flax import nnx

from dit_jax.models import layers
from dit_jax.models.attention import Attention, CrossAttention
from dit_jax.models.layers import layer_norm, modulate


class InContextBlock(nnx.Module):
    """Attention and MLP. The conditions are tokens of x already, so c is not used."""

    def __init__(self, hidden_size, num_heads, *, dtype, attention, rngs):
        options = {"dtype": dtype, "rngs": rngs}
        self.attn = Attention(hidden_size, num_heads, attention=attention, **options)
        self.mlp = layers.Mlp(hidden_size, **options)

    def __call__(self, x, c):
        x = x + self.attn(layer_norm(x))
        return x + self.mlp(layer_norm(x))


class CrossAttentionBlock(InContextBlock):
    """Attention, cross-attention to the conditions c (N, M, D), and MLP."""

    def __init__(self, hidden_size, num_heads, *, dtype, attention, rngs):
        super().__init__(hidden_size, num_heads, dtype=dtype, attention=attention, rngs=rngs)
        self.cross_attn = CrossAttention(hidden_size, num_heads, dtype=dtype, rngs=rngs)

    def __call__(self, x, c):
        x = x + self.attn(layer_norm(x))
        x = x + self.cross_attn(layer_norm(x), c)
        return x + self.mlp(layer_norm(x))


class AdaLNBlock(InContextBlock):
    """Attention and MLP, each shifted and scaled by its modulations (N, 1, 4, D)."""

    chunks = 4

    def __init__(self, hidden_size, num_heads, *, dtype, attention, rngs):
        super().__init__(hidden_size, num_heads, dtype=dtype, attention=attention, rngs=rngs)
        self.adaLN_modulation = layers.Linear(  # applied by the DiT, for all its blocks at once
            hidden_size, self.chunks * hidden_size, kernel_init=layers.zeros, dtype=dtype, rngs=rngs
        )

    def __call__(self, x, modulations):
        shift_msa, scale_msa, shift_mlp, scale_mlp = jnp.unstack(modulations, axis=2)  # (N, 1, D)
        x = x + self.attn(modulate(layer_norm(x), shift_msa, scale_msa))
        return x + self.mlp(modulate(layer_norm(x), shift_mlp, scale_mlp))


class AdaLNZeroBlock(AdaLNBlock):
    """As AdaLNBlock, and each branch is gated (N, 1, 6, D); every gate is 0 at the start."""

    chunks = 6

    def __call__(self, x, modulations):
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = jnp.unstack(
            modulations, axis=2
        )
        x = x + gate_msa * self.attn(modulate(layer_norm(x), shift_msa, scale_msa))
        return x + gate_mlp * self.mlp(modulate(layer_norm(x), shift_mlp, scale_mlp))


BLOCKS = {
    "in_context": InContextBlock,
    "cross_attention": CrossAttentionBlock,
    "adaln": AdaLNBlock,
    "adaln_zero": AdaLNZeroBlock,
}
