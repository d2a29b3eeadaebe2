"""What training carries from step to step."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dit_jax import compat
from dit_jax.machine import sharding


class TrainState(NamedTuple):
    """step: number of updates made, int32 (). params, ema: trees of float32. opt_state: optax's."""

    step: jax.Array
    params: Any
    ema: Any
    opt_state: Any


def create(init, optimizer, given, mesh, *, shard_optimizer):
    """A TrainState born sharded on the mesh.

    init(given) -> params; given is a key, or the parameters of another run.
    """
    templates = abstract(init, optimizer, given, mesh, shard_optimizer=shard_optimizer)
    return jax.jit(_maker(init, optimizer), out_shardings=shardings(templates))(given)


def abstract(init, optimizer, given, mesh, *, shard_optimizer):
    """The TrainState that `create` makes, as ShapeDtypeStructs with shardings.

    shard_optimizer: the EMA and the optimizer's state are sharded over `data` too (ZeRO-1).
    """
    shapes = jax.eval_shape(_maker(init, optimizer), given)
    divided = sharding.of_params(shapes, mesh, over_data=shard_optimizer)
    return sharding.abstract(
        shapes, divided._replace(params=sharding.of_params(shapes.params, mesh))
    )


def shardings(state):
    """The shardings of a state, or of its templates."""
    return jax.tree.map(lambda x: x.sharding, state)


def _maker(init, optimizer):
    def make(given):
        params = init(given)
        with compat.default_arithmetic():
            opt_state = optimizer.init(params)
        # The EMA starts at the parameters: from zeros it would stay too small for a long time.
        return TrainState(jnp.zeros((), jnp.int32), params, params, opt_state)

    return make
