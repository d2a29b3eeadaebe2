import jax
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from dit_jax.errors import UserError
from dit_jax.machine import sharding
from dit_jax.models import dit

SHAPES = jax.eval_shape(lambda: dit.init(dit.configure("Ti", 2), jax.random.key(0)))


def specs(**sizes):
    """The PartitionSpecs of the parameters on a mesh of these sizes."""
    over_data = sizes.pop("over_data", False)
    mesh = sharding.make_mesh(**sizes)
    shardings = sharding.of_params(SHAPES, mesh, over_data=over_data)
    for x, leaf in zip(jax.tree.leaves(SHAPES), jax.tree.leaves(shardings), strict=True):
        leaf.shard_shape(x.shape)  # raises if the shards are not equal
    return jax.tree.map(lambda leaf: leaf.spec, shardings)


@pytest.mark.parametrize(
    "sizes, shape",
    [({}, (8, 1, 1)), ({"fsdp": 4}, (2, 4, 1)), ({"data": 1, "fsdp": 2, "tensor": -1}, (1, 2, 4))],
)
def test_mesh_has_all_devices_and_auto_axes(sizes, shape):
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
def test_mesh_of_wrong_size_is_a_user_error(sizes, message):
    with pytest.raises(UserError, match=message):
        sharding.make_mesh(**sizes)


def test_parameters_are_replicated_by_default():
    assert all(spec == PartitionSpec(*[None] * len(spec)) for spec in jax.tree.leaves(specs()))
    assert sharding.make_gather(sharding.make_mesh()) is None


def test_fsdp_shards_every_parameter_but_not_the_axis_of_layers():
    tree = specs(fsdp=8)
    assert tree["blocks"]["mlp"]["fc1"]["kernel"] == PartitionSpec(None, None, "fsdp")
    assert tree["blocks"]["attn"]["proj"]["kernel"] == PartitionSpec(None, "fsdp", None)
    assert tree["y_embedder"]["embedding_table"]["embedding"] == PartitionSpec(None, "fsdp")
    sharded = [spec for spec in jax.tree.leaves(tree) if "fsdp" in spec]
    assert len(sharded) == len(jax.tree.leaves(tree))


def test_tensor_shards_only_heads_and_mlp_of_the_blocks():
    tree = specs(data=1, fsdp=2, tensor=4)
    block = tree["blocks"]
    assert block["attn"]["qkv"]["kernel"] == PartitionSpec(None, "fsdp", None, "tensor")
    assert block["attn"]["qkv"]["bias"][-1][0] == "tensor"
    assert block["attn"]["proj"]["kernel"] == PartitionSpec(None, "tensor", "fsdp")
    assert "tensor" in block["mlp"]["fc1"]["kernel"][2]
    assert "tensor" in block["mlp"]["fc2"]["kernel"][1]
    del tree["blocks"]
    assert not any("tensor" in str(spec) for spec in jax.tree.leaves(tree))


def test_optimizer_state_can_be_sharded_over_data_too():
    tree = specs(data=4, fsdp=2, over_data=True)
    assert tree["blocks"]["mlp"]["fc1"]["kernel"] == PartitionSpec(None, None, ("fsdp", "data"))


@pytest.mark.parametrize(
    "features, spec", [(24, (None, "data", None, ("tensor", "fsdp"))), (6, (None, "data"))]
)
def test_modulation_is_computed_where_its_weights_are(features, spec):
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    shape = (3, 4, 1, features)  # (L, N, 1, F)
    found = sharding._even(sharding.ACTIVATIONS["modulation"][0], shape, mesh)
    assert sharding.NamedSharding(mesh, found).is_equivalent_to(
        sharding.NamedSharding(mesh, PartitionSpec(*spec)), 4
    )


def test_local_rows_become_the_global_batch():
    batch = sharding.of_batch(sharding.make_mesh(fsdp=2, tensor=2))
    rows = sharding.local_rows(batch, 16)
    assert rows == list(range(16))
    x = np.arange(48).reshape(16, 3)
    whole = sharding.from_local_rows(x, rows, 16, batch)
    assert whole.sharding == batch and whole.addressable_shards[0].data.shape == (4, 3)
    np.testing.assert_array_equal(sharding.to_host(whole), x)


def test_axis_of_layers_is_not_sharded_even_where_it_is_the_largest():
    mesh = sharding.make_mesh(fsdp=8)
    tree = {"blocks": {"w": jax.ShapeDtypeStruct((64, 16, 12), np.float32)}}
    assert sharding.of_params(tree, mesh)["blocks"]["w"].spec == PartitionSpec(None, "fsdp", None)
