"""Where arrays live: one mesh over all devices, and rules from a leaf's path to its sharding.

The mesh has three axes. `data` and `fsdp` divide the batch. `fsdp` also divides every parameter,
which is gathered where it is used (Zhao et al. 2023, https://arxiv.org/abs/2304.11277). `tensor`
divides heads and the width of the MLP (Shoeybi et al. 2019, https://arxiv.org/abs/1909.08053). The
optimizer's state and the average can be divided by `data` too (ZeRO-1, Rajbhandari et al. 2020,
https://arxiv.org/abs/1910.02054).
"""

import math
import re

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.tree_util import DictKey

from dit_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")
BATCH = PartitionSpec(("data", "fsdp"))
TENSOR = {  # the axis, from the end, that `tensor` divides of a parameter of the blocks
    r"attn/(qkv|q|kv)/(kernel|bias)": -1,  # whole heads
    r"attn/proj/kernel": -2,
    r"mlp/fc1/(kernel|bias)": -1,
    r"mlp/fc2/kernel": -2,
    r"adaLN_modulation/(kernel|bias)": -1,
}

ACTIVATIONS = {  # how they are divided, once and once more, on their way to their use
    # Of (L, N, 1, F), whose weights are large beside N: made where these lie, sent to its rows.
    "modulation": [
        (None, ("data",), None, ("tensor", "fsdp")),
        (None, ("data", "fsdp"), None, ("tensor",)),
        (None, ("data", "fsdp")),
    ],
    "chunks": [(None, ("data", "fsdp"), None, None, ("tensor",))],  # (L, N, 1, chunks, D)
}


def make_mesh(*, data=-1, fsdp=1, tensor=1, devices=None):
    """The mesh over all devices, or those given; -1 stands for what the other axes leave.

    Neighbours along `tensor` are neighbours in the machine, then those along `fsdp`; only `data`
    leaves a slice of TPUs.
    """
    devices = jax.devices() if devices is None else devices
    shape = _fill((data, fsdp, tensor), len(devices))
    types = (AxisType.Auto,) * len(AXES)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return jax.make_mesh(shape, AXES, axis_types=types, devices=devices)
    if shape[0] % slices:
        raise UserError(f"mesh.data must be divisible by {slices} slices, got {shape[0]}")
    inner = (shape[0] // slices, *shape[1:])
    grid = mesh_utils.create_hybrid_device_mesh(
        inner, (slices, 1, 1), devices, allow_split_physical_axes=True
    )
    return Mesh(grid, AXES, axis_types=types)


def _fill(shape, count):
    for name, size in zip(AXES, shape, strict=True):
        if size < 1 and size != -1:
            raise UserError(f"mesh.{name} must be at least 1, or -1 for the rest, got {size}")
    if shape.count(-1) > 1:
        raise UserError(f"only one axis of mesh may be -1, got {shape.count(-1)} of {len(AXES)}")
    given = math.prod(size for size in shape if size != -1)
    rest = count // given
    full = tuple(rest if size == -1 else size for size in shape)
    if math.prod(full) != count:
        text = " x ".join(f"{name} {size}" for name, size in zip(AXES, shape, strict=True))
        wrong = f"{given} does not divide {count}" if -1 in shape else f"these are {given}"
        raise UserError(f"mesh must be of {count} devices, got {text}: {wrong}")
    return full


def of_batch(mesh):
    """The leading axis of a batch is divided by `data` and `fsdp`."""
    return NamedSharding(mesh, BATCH)


def batch_shards(mesh):
    """In how many parts a batch is divided."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def replicated(mesh):
    return NamedSharding(mesh, PartitionSpec())


def of_params(tree, mesh, *, over_data=False):
    """The shardings of parameters, or of a tree with their paths in it, as an optimizer's state.

    Each axis of the mesh divides that axis of a leaf of which a device has most, if evenly, so that
    no side of a shard is thin; where there is none, the leaf is copied along it. over_data: also by
    `data`.
    """
    axes = ("fsdp", "data") if over_data else ("fsdp",)
    return _map_names(lambda name, x: NamedSharding(mesh, _spec(name, x.shape, mesh, axes)), tree)


def make_gather(mesh):
    """gather(tree, dtype), the parameters as they are used: divided by `tensor` alone.

    tree is a nested dict with the paths of a DiT; in `blocks` it has one of them. They are sent
    in the type of the arithmetic, and so are their gradients. Under a name of ACTIVATIONS it has
    one of these. None where nothing is gathered.
    """
    if mesh.shape["fsdp"] == mesh.shape["tensor"] == 1:
        return None

    def gather(tree, dtype):
        def put(name, x):
            if name not in ACTIVATIONS:
                return jax.lax.with_sharding_constraint(
                    x.astype(dtype), NamedSharding(mesh, _spec(name, x.shape, mesh, ()))
                )
            for spec in ACTIVATIONS[name]:
                place = NamedSharding(mesh, _even(spec, x.shape, mesh))
                x = jax.lax.with_sharding_constraint(x, place)
            return x

        return _map_names(put, tree)

    return gather


def check_heads(mesh, num_heads):
    """UserError where `tensor` would divide a head."""
    if num_heads % mesh.shape["tensor"]:
        raise UserError(f"mesh.tensor must divide {num_heads} heads, got {mesh.shape['tensor']}")


def _map_names(function, tree):
    """function(name, leaf) of all leaves; a name is as blocks/attn/qkv/kernel."""

    def call(path, x):
        return function("/".join(key.key for key in path if isinstance(key, DictKey)), x)

    return jax.tree_util.tree_map_with_path(call, tree)


def _spec(name, shape, mesh, axes):
    """The PartitionSpec of a leaf: by `tensor` as in TENSOR, and by the other axes given."""
    divided = {}  # axis of the array: axes of the mesh
    is_block = name.startswith("blocks/")
    for pattern, axis in TENSOR.items():
        if is_block and mesh.shape["tensor"] > 1 and re.search(f"{pattern}$", name):
            divided[len(shape) + axis] = ("tensor",)

    def left(axis):
        return shape[axis] // math.prod(mesh.shape[name] for name in divided.get(axis, ()))

    layers = 1 if is_block else 0  # that axis stays whole: a loop walks along it
    for extra in (extra for extra in axes if mesh.shape[extra] > 1):
        for axis in sorted(range(layers, len(shape)), key=left, reverse=True):
            if left(axis) % mesh.shape[extra] == 0:
                divided[axis] = (*divided.get(axis, ()), extra)
                break
    return PartitionSpec(*(divided.get(axis) for axis in range(len(shape))))


def _even(spec, shape, mesh):
    """The PartitionSpec of an array, whole along the axes that would not be divided evenly."""
    parts = [math.prod(mesh.shape[name] for name in names or ()) for names in spec]
    entries = zip(spec, parts, shape, strict=False)
    return PartitionSpec(*(None if size % count else names for names, count, size in entries))


def abstract(tree, shardings):
    """The tree as ShapeDtypeStructs that carry their shardings: what a restore asks for."""
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        tree,
        shardings,
    )


def local_rows(sharding, count):
    """The rows, of `count` of a batch, that lie on devices of this process, ascending."""
    places = sharding.addressable_devices_indices_map((count,)).values()
    return sorted({row for (rows,) in places for row in range(*rows.indices(count))})


def to_global(x, sharding):
    """The global array of a NumPy array that is whole on every process."""
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def from_local_rows(x, rows, count, sharding):
    """The global array (count, ...) of which every process has its `local_rows` in x."""

    def read(index):
        start, stop, _ = index[0].indices(count)
        first = rows.index(start)
        return x[first : first + stop - start]

    return jax.make_array_from_callback((count, *x.shape[1:]), sharding, read)


def to_host(x):
    """A global array as NumPy, whole, on every process."""
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    jax.block_until_ready(x)  # two programs that wait for other processes may lock a CPU's threads
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))
