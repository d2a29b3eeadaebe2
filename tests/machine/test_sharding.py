import jax
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from dit_jax.machine import sharding
from dit_jax.models import dit

SHAPES = jax.eval_shape(lambda: dit.init(dit.configure("Ti", 2), jax.random.key(0)))


def specs(**sizes):
    over_data = sizes.pop("over_data", False)
    mesh = sharding.make_mesh(**sizes)
    places = sharding.of_params(SHAPES, mesh, over_data=over_data)
    for x, place in zip(jax.tree.leaves(SHAPES), jax.tree.leaves(places), strict=True):
        place.shard_shape(x.shape)  # raises where a leaf is not divided evenly
    return jax.tree.map(lambda place: place.spec, places)


@pytest.mark.parametrize(
    "sizes, shape",
    [({}, (8, 1, 1)), ({"fsdp": 4}, (2, 4, 1)), ({"data": 1, "fsdp": 2, "tensor": -1}, (1, 2, 4))],
)
def test_the_mesh_has_every_device_on_automatic_axes(sizes, shape):
    mesh = sharding.make_mesh(**sizes)
    assert tuple(mesh.shape.values()) == shape and mesh.axis_names == ("data", "fsdp", "tensor")
    assert mesh.axis_types == (AxisType.Auto,) * 3
    assert sharding.batch_shards(mesh) == shape[0] * shape[1]
    assert sorted(device.id for device in mesh.devices.flat) == list(range(8))


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"data": 3}, "mesh must be of 8 devices, got data 3 x fsdp 1 x tensor 1"),
        ({"fsdp": 3}, "mesh must be of 8 devices, got data -1 x fsdp 3 x tensor 1"),
        ({"fsdp": 16}, "mesh must be of 8 devices, got data -1 x fsdp 16"),
        ({"tensor": 0}, "mesh.tensor must be at least 1, or -1 for the rest, got 0"),
        ({"fsdp": -1}, "only one axis of mesh may be -1, got 2 of 3"),
    ],
)
def test_a_mesh_that_does_not_fit_is_named(sizes, message):
    with pytest.raises(ValueError, match=message):
        sharding.make_mesh(**sizes)


def test_by_default_parameters_are_copied():
    assert all(spec == PartitionSpec(*[None] * len(spec)) for spec in jax.tree.leaves(specs()))
    assert sharding.make_gather(sharding.make_mesh()) is None


def test_fsdp_divides_every_large_parameter_but_not_the_axis_of_layers():
    places = specs(fsdp=8)
    assert places["blocks"]["mlp"]["fc1"]["kernel"] == PartitionSpec(None, None, "fsdp")
    assert places["blocks"]["attn"]["proj"]["kernel"] == PartitionSpec(None, "fsdp", None)
    assert places["y_embedder"]["embedding_table"]["embedding"] == PartitionSpec(None, "fsdp")
    divided = [spec for spec in jax.tree.leaves(places) if "fsdp" in spec]
    assert len(divided) == len(jax.tree.leaves(places))


def test_tensor_divides_heads_and_mlp_of_the_blocks_alone():
    places = specs(data=1, fsdp=2, tensor=4)
    block = places["blocks"]
    assert block["attn"]["qkv"]["kernel"] == PartitionSpec(None, "fsdp", None, "tensor")
    assert block["attn"]["qkv"]["bias"][-1][0] == "tensor"
    assert block["attn"]["proj"]["kernel"] == PartitionSpec(None, "tensor", "fsdp")
    assert "tensor" in block["mlp"]["fc1"]["kernel"][2]
    assert "tensor" in block["mlp"]["fc2"]["kernel"][1]
    del places["blocks"]
    assert not any("tensor" in str(spec) for spec in jax.tree.leaves(places))


def test_the_optimizer_is_divided_over_data_too():
    places = specs(data=4, fsdp=2, over_data=True)
    assert places["blocks"]["mlp"]["fc1"]["kernel"] == PartitionSpec(None, None, ("fsdp", "data"))


@pytest.mark.parametrize(
    "features, spec", [(24, (None, "data", None, ("tensor", "fsdp"))), (6, (None, "data"))]
)
def test_a_modulation_is_made_where_its_weights_are(features, spec):
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    shape = (3, 4, 1, features)  # (L, N, 1, F)
    found = sharding._even(sharding.ACTIVATIONS["modulation"][0], shape, mesh)
    assert sharding.NamedSharding(mesh, found).is_equivalent_to(
        sharding.NamedSharding(mesh, PartitionSpec(*spec)), 4
    )


def test_rows_of_this_process_become_the_global_batch():
    place = sharding.of_batch(sharding.make_mesh(fsdp=2, tensor=2))
    rows = sharding.local_rows(place, 16)
    assert rows == list(range(16))
    x = np.arange(48).reshape(16, 3)
    whole = sharding.from_local_rows(x, rows, 16, place)
    assert whole.sharding == place and whole.addressable_shards[0].data.shape == (4, 3)
    np.testing.assert_array_equal(sharding.to_host(whole), x)
