"""Which tokens pass which blocks: tokens that join late, two heads, training on fewer tokens.

The last is TREAD, Krause et al. 2025 (https://arxiv.org/abs/2501.04765). In each example and
step, random tokens go around the blocks first .. last and join the others behind them. The loss is
of all tokens, and nothing is added to the model, so that sampling needs no change. Shapes: N batch,
T tokens, K tokens that are kept, M tokens of the conditions, S tokens that join, D hidden size.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dit_jax.errors import UserError


class Routing(NamedTuple):
    """How many of the tokens skip the blocks `first` .. `last`, which are counted from 0."""

    first: int
    last: int
    num_tokens: int
    num_skipping: int

    def draw(self, key, count):
        """Which tokens of so many examples are kept: indices, int32 (N, K)."""
        order = jax.random.uniform(key, (count, self.num_tokens), jnp.float32).argsort(axis=1)
        return order[:, self.num_skipping :].astype(jnp.int32)

    def run(self, blocks, x, kept):
        """x (N, T + M, D) -> the same after all blocks; the last M tokens skip none.

        blocks(x, first, stop): x after the blocks first .. stop - 1.
        """
        others = jnp.arange(self.num_tokens, x.shape[1], dtype=kept.dtype)
        others = jnp.broadcast_to(others, (len(x), len(others)))
        kept = jnp.concatenate([kept, others], axis=1)  # (N, K + M)
        x = blocks(x, 0, self.first)
        few = jnp.take_along_axis(x, kept[:, :, None], axis=1)
        few = blocks(few, self.first, self.last + 1)
        x = x.at[jnp.arange(len(x))[:, None], kept].set(few, unique_indices=True)
        return blocks(x, self.last + 1, None)


def join(blocks, x, tokens, *, first):
    """x (N, T, D) -> (N, T + S, D) after all blocks, with tokens (N, S, D) that join.

    first: the block before which they join. blocks: as in `Routing.run`.
    """
    x = jnp.concatenate([blocks(x, 0, first) if first else x, tokens], axis=1)
    return blocks(x, first, None)


def branch(blocks, x, config):
    """x (N, T, D) after the blocks of each of two heads, [(N, T, D), (N, T, D)].

    The stack holds the blocks that both share, then `head_depth` of each. blocks: as in
    `Routing.run`.
    """
    shared = config.depth - config.head_depth
    x = blocks(x, 0, shared)
    return [blocks(x, shared, config.depth), blocks(x, config.depth, None)]


def make(config, share, blocks):
    """The Routing of a DiTConfig; None if the share of tokens that skip blocks is 0.

    blocks: (first, last), or () for all but the first and the last one. UserError if the share is
    too small for the tokens, the model has no such blocks, or its tokens cannot be routed.
    """
    if blocks and not share:
        raise UserError(f"route_blocks must be () if route_share is 0, got {blocks}")
    if not share:
        return None
    first, last = blocks or (1, config.depth - 2)
    if not 0 <= first <= last < config.depth:
        rule = f"(first, last), first <= last, in 0 .. {config.depth - 1}"
        raise UserError(f"route_blocks must be {rule}, got {tuple(blocks)}")

    if config.position != "sincos" or config.class_tokens:
        raise UserError(
            f"route_share must be 0 for a model with position rope or class_tokens, got {share}"
        )
    num_skipping = int(config.num_tokens * share)
    if not num_skipping:
        raise UserError(
            f"route_share must be 0 or at least one of {config.num_tokens} tokens, got {share}"
        )
    return Routing(first, last, config.num_tokens, num_skipping)
