import jax
import numpy as np
import optax

from dit_jax.machine import sharding
from dit_jax.train import state as states


def init(key):
    return {"kernel": jax.random.normal(key, (4, 8)), "bias": jax.numpy.zeros(8)}


def test_a_new_state_is_on_all_devices_and_its_ema_equals_the_parameters():
    mesh, optimizer = sharding.make_mesh(), optax.sgd(0.1, momentum=0.9)
    state = states.create(init, optimizer, jax.random.key(0), mesh, shard_optimizer=False)
    assert int(state.step) == 0 and state.step.dtype == np.int32
    np.testing.assert_array_equal(state.ema["kernel"], state.params["kernel"])
    assert all(len(x.sharding.device_set) == 8 for x in jax.tree.leaves(state))


def test_a_new_state_is_traced_once():
    traced, mesh = [], sharding.make_mesh()

    def counted(key):
        traced.append(key)
        return init(key)

    states.create(counted, optax.sgd(0.1), jax.random.key(0), mesh, shard_optimizer=False)
    assert len(traced) == 1


def test_the_abstract_state_has_the_shapes_and_shardings_of_a_real_one():
    mesh, optimizer, key = sharding.make_mesh(), optax.sgd(0.1, momentum=0.9), jax.random.key(0)
    real, abstract = (
        make(init, optimizer, key, mesh, shard_optimizer=True)
        for make in (states.create, states.abstract)
    )
    assert not real.opt_state[0].trace["kernel"].sharding.is_fully_replicated
    assert real.params["kernel"].sharding.is_fully_replicated

    def describe(x):
        return x.shape, x.dtype, x.sharding

    assert jax.tree.map(describe, real) == jax.tree.map(describe, abstract)
