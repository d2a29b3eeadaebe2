"""What `make_apply(config, watch=True)` shows of a DiT's blocks.

Shapes: N batch, T tokens, L blocks, D hidden size, K heads.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Watched(NamedTuple):
    """What happens inside the blocks of a DiT.

    x (L+1, N, T, D): the tokens before the first block and after each. attention (L, N, K, T, T)
    float32: the weights of each block, from a token in the last axis but one to all tokens. T
    counts the tokens of the conditions, if they are in context, and the class tokens, which are
    last. Before these join, their x and their attention are 0.
    """

    x: jax.Array
    attention: jax.Array


def join(kept, x):
    """The Watched of loops over blocks, [(x before each block, its attention), ...], in turn.

    x (N, T, D): after the last block. Earlier loops may have had fewer tokens.
    """

    def grow(array, axes):
        more = x.shape[1] - array.shape[-2]  # the axis of tokens
        return jnp.pad(array, [(0, more * (axis in axes)) for axis in range(array.ndim)])

    before = [grow(array, (2,)) for array, _ in kept]
    weights = [grow(array, (3, 4)) for _, array in kept]
    return Watched(jnp.concatenate([*before, x[None]]), jnp.concatenate(weights))
