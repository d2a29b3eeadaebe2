import numpy as np
from jax.sharding import AxisType, PartitionSpec

from dit_jax import sharding


def test_the_mesh_has_every_device_on_an_automatic_axis():
    mesh = sharding.make_mesh()
    assert mesh.shape == {"data": 8}
    assert mesh.axis_types == (AxisType.Auto,)


def test_batches_are_split_and_states_copied():
    mesh = sharding.make_mesh()
    assert sharding.of_batch(mesh).spec == PartitionSpec("data")
    places = sharding.of_state({"kernel": np.zeros((8, 8))}, mesh)
    assert places["kernel"].is_fully_replicated
