"""What a DiT is conditioned on: an embedder for each condition, and its null value.

To add one, write its embedder here and list it in `of`, and its name in `fields.CONDITIONS`. The
model and guidance take their conditions from the names in a DiTConfig. Shapes: N batch, S tokens of
a condition, D hidden size, L labels with the null label, if there is one.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from dit_jax.models.layers import Linear, fan_in, normal

FREQUENCIES = 256  # size of the sinusoidal embedding of t
# The tokens of each condition in the design in_context_zero, in their order: those of iMF, and t.
TOKENS = {"y": 8, "omega": 4, "t_min": 2, "t_max": 2, "h": 4, "t": 4}


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
    """The conditions of a DiTConfig, in the order of their tokens.

    t: the time. y: the label. Of one-step models, all in 0 .. 1 but omega: h, how far below t the
    velocity is averaged; omega, the scale of the guidance in t_min <= t <= t_max.
    """
    has_tokens = config.conditioning == "in_context_zero"
    kernel, row = (fan_in(1), _row(config.hidden_size)) if has_tokens else (normal, normal)
    time = functools.partial(TimestepEmbedder, kernel_init=kernel)
    scale = functools.partial(ScaleEmbedder, kernel_init=kernel)
    num_labels = config.num_classes + config.null_label
    known = [
        Condition("t", time, None),
        Condition("h", time, None),
        Condition("omega", scale, None),
        Condition("t_min", time, None),
        Condition("t_max", time, None),
        Condition(
            "y",
            functools.partial(LabelEmbedder, num_labels, embedding_init=row),
            config.num_classes if config.null_label else None,
        ),
    ]
    if has_tokens:
        by_name = {each.name: each for each in known}
        known = [_with_tokens(by_name[name], count) for name, count in TOKENS.items()]
    return tuple(each for each in known if each.name in config.conditions)


def _with_tokens(condition, count):
    make = functools.partial(TokensEmbedder, condition.make, count)
    return condition._replace(make=make, num_tokens=count)


def _row(hidden_size):
    """The initializer of learned vectors (..., D) of in_context_zero."""
    return nnx.initializers.normal(hidden_size**-0.5)


def count_tokens(config):
    """How many tokens the conditions of a DiTConfig have together: M."""
    return sum(each.num_tokens for each in of(config))


def nulls(config, *, mixed=False):
    """{name: null value} of the conditions that can be left out.

    mixed: y's are weights, so that its null value is too: (L,), 1 for the null label.
    """
    values = {each.name: each.null for each in of(config) if each.null is not None}
    if mixed and "y" in values:
        values["y"] = np.eye(values["y"] + 1, dtype=np.float32)[-1]
    return values


def timestep_embedding(t):
    """Sinusoids of t, [cos, sin], with periods from 2 pi to 2 pi * 10^4. t (N,) -> (N, 256)."""
    half = FREQUENCIES // 2
    frequencies = np.exp(-np.log(10_000) * np.arange(half) / half).astype(np.float32)
    angles = t[:, None].astype(jnp.float32) * frequencies[None]  # (N, 128)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)  # (N, 256)


class TimestepEmbedder(nnx.Module):
    """An MLP of the sinusoids of t; t (N,) may be a step or any real number."""

    def __init__(self, hidden_size, *, kernel_init=normal, dtype, rngs):
        options = {"kernel_init": kernel_init, "dtype": dtype, "rngs": rngs}
        self.fc1 = Linear(FREQUENCIES, hidden_size, **options)
        self.fc2 = Linear(hidden_size, hidden_size, **options)

    def __call__(self, t):
        return self.fc2(nnx.silu(self.fc1(timestep_embedding(t))))  # (N, D)


class ScaleEmbedder(TimestepEmbedder):
    """A TimestepEmbedder of 1 - 1 / omega, for scales omega (N,) of at least 1."""

    def __call__(self, omega):
        return super().__call__(1 - 1 / omega)


class LabelEmbedder(nnx.Module):
    """A learned vector for each label, the null label last.

    y (N,) are labels; y (N, L), with a column for each of the L vectors, are weights that mix them.
    """

    def __init__(self, num_labels, hidden_size, **options):
        self.embedding_table = nnx.Embed(num_labels, hidden_size, **options)

    def __call__(self, y):
        embed = self.embedding_table
        if y.ndim == 1:
            return embed(y)  # (N, D)
        # Exact, so that the weight 1 gives the vector of that label on a TPU too.
        table = embed.embedding[...].astype(jnp.float32)
        mixed = jnp.einsum("nl,ld->nd", y, table, precision="highest")  # (N, D)
        return mixed.astype(embed.dtype)


class TokensEmbedder(nnx.Module):
    """The embedding of `make`, added to each of num_tokens learned vectors: (N, S, D)."""

    def __init__(self, make, num_tokens, hidden_size, *, dtype, rngs):
        self.embedder = make(hidden_size, dtype=dtype, rngs=rngs)
        self.tokens = nnx.Param(_row(hidden_size)(rngs.params(), (num_tokens, hidden_size)))

    def __call__(self, values):
        embedding = self.embedder(values)[:, None]  # (N, 1, D)
        return embedding + self.tokens[...].astype(embedding.dtype)[None]
