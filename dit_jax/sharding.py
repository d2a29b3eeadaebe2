"""Where arrays live: one mesh over all devices, and rules from a leaf's place to its sharding."""

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def make_mesh(*, local=False):
    """All devices along one axis, "data": of all processes, or of this one alone."""
    devices = jax.local_devices() if local else jax.devices()
    return jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)


def of_batch(mesh):
    """The leading axis of a batch is split over the devices."""
    return NamedSharding(mesh, PartitionSpec("data"))


def replicated(mesh):
    return NamedSharding(mesh, PartitionSpec())


def of_state(tree, mesh):
    """The shardings of a tree of parameters, averages or optimizer state: a copy on each device."""
    return jax.tree.map(lambda _: replicated(mesh), tree)


def abstract(tree, shardings):
    """The tree as ShapeDtypeStructs that carry their shardings: what a restore asks for."""
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        tree,
        shardings,
    )
