"""What training carries from step to step."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dit_jax import sharding


class TrainState(NamedTuple):
    """step: number of updates made, int32 (). params, ema: trees of float32. opt_state: optax's."""

    step: jax.Array
    params: Any
    ema: Any
    opt_state: Any


def create(init, optimizer, key, mesh):
    """A TrainState born sharded on the mesh. init(key) -> params."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract(init, optimizer, key, mesh))
    return jax.jit(_maker(init, optimizer), out_shardings=shardings)(key)


def abstract(init, optimizer, key, mesh):
    """The TrainState that `create` makes, as ShapeDtypeStructs with shardings."""
    shapes = jax.eval_shape(_maker(init, optimizer), key)
    return sharding.abstract(shapes, sharding.of_state(shapes, mesh))


def _maker(init, optimizer):
    def make(key):
        params = init(key)
        # The average starts at the parameters: from zeros it would be far too small for long.
        return TrainState(jnp.zeros((), jnp.int32), params, params, optimizer.init(params))

    return make
