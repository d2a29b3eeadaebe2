"""What training carries from step to step."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dit_jax import compat
from dit_jax.machine import sharding


class TrainState(NamedTuple):
    """step: number of updates made, int32 (). params, ema: trees of float32. opt_state: optax's.

    averages: the power-function averages of the parameters, trees as params; () if there are none.
    """

    step: jax.Array
    params: Any
    ema: Any
    opt_state: Any
    averages: tuple = ()

    @property
    def saved(self):
        """{name: tree} of what a checkpoint holds."""
        trees = {"params": self.params, "ema": self.ema, "opt_state": self.opt_state}
        return trees | ({"averages": self.averages} if self.averages else {})


def create(init, optimizer, given, mesh, *, shard_optimizer, num_averages=0):
    """A TrainState born sharded on the mesh.

    init(given) -> params; given is a key, or the parameters of another run.
    """
    make = _maker(init, optimizer, num_averages)
    templates = _templates(make, given, mesh, shard_optimizer)
    return jax.jit(make, out_shardings=shardings(templates))(given)  # jax has traced make above


def abstract(init, optimizer, given, mesh, *, shard_optimizer, num_averages=0):
    """The TrainState that `create` makes, as ShapeDtypeStructs with shardings.

    shard_optimizer: the averages and the optimizer's state are sharded over `data` too (ZeRO-1).
    """
    return _templates(_maker(init, optimizer, num_averages), given, mesh, shard_optimizer)


def _templates(make, given, mesh, shard_optimizer):
    shapes = jax.eval_shape(make, given)
    divided = sharding.of_params(shapes, mesh, over_data=shard_optimizer)
    return sharding.abstract(
        shapes, divided._replace(params=sharding.of_params(shapes.params, mesh))
    )


def shardings(state):
    """The shardings of a state, or of its templates."""
    return jax.tree.map(lambda x: x.sharding, state)


def _maker(init, optimizer, num_averages):
    def make(given):
        params = init(given)
        with compat.default_arithmetic():
            opt_state = optimizer.init(params)
        # The EMA starts at the parameters: from zeros it would stay too small for a long time.
        # The first update of the other averages takes the new parameters whole.
        averages = (params,) * num_averages
        return TrainState(jnp.zeros((), jnp.int32), params, params, opt_state, averages)

    return make
