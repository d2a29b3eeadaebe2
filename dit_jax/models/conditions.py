"""What a DiT is conditioned on: an embedder for each condition, and its null value.

To add one, write its embedder here and list it in `of`: the model and guidance take their
conditions from that list. Shapes: N batch, S tokens of a condition, D hidden size.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from dit_jax.models.layers import Linear, normal

FREQUENCIES = 256  # size of the sinusoidal embedding of t


class Condition(NamedTuple):
    """name: the model's keyword; the parameters are under NAME_embedder.

    make(hidden_size, *, dtype, rngs) -> a module that maps values (N, ...) to (N, D), or to
    (N, S, D) with num_tokens S. null: the value that means "not given", for guidance; None if the
    condition is always given.
    """

    name: str
    make: Callable
    null: int | None
    num_tokens: int = 1


def of(config):
    """The conditions of a DiTConfig, in the order of their tokens."""
    label = functools.partial(LabelEmbedder, config.num_classes + config.null_label)
    null = config.num_classes if config.null_label else None
    return Condition("t", TimestepEmbedder, None), Condition("y", label, null)


def nulls(config):
    """{name: null value} of the conditions that can be left out."""
    return {each.name: each.null for each in of(config) if each.null is not None}


def timestep_embedding(t):
    """Sinusoids of t, [cos, sin], with periods from 2 pi to 2 pi * 10^4. t (N,) -> (N, 256)."""
    half = FREQUENCIES // 2
    frequencies = np.exp(-np.log(10_000) * np.arange(half) / half).astype(np.float32)
    angles = t[:, None].astype(jnp.float32) * frequencies[None]  # (N, 128)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)  # (N, 256)


class TimestepEmbedder(nnx.Module):
    """An MLP of the sinusoids of t; t (N,) may be a step or any real number."""

    def __init__(self, hidden_size, *, dtype, rngs):
        options = {"kernel_init": normal, "dtype": dtype, "rngs": rngs}
        self.fc1 = Linear(FREQUENCIES, hidden_size, **options)
        self.fc2 = Linear(hidden_size, hidden_size, **options)

    def __call__(self, t):
        return self.fc2(nnx.silu(self.fc1(timestep_embedding(t))))  # (N, D)


class LabelEmbedder(nnx.Module):
    """A learned vector for each label, the null label last."""

    def __init__(self, num_labels, hidden_size, *, dtype, rngs):
        self.embedding_table = nnx.Embed(
            num_labels, hidden_size, embedding_init=normal, dtype=dtype, rngs=rngs
        )

    def __call__(self, y):
        return self.embedding_table(y)  # (N, D)
