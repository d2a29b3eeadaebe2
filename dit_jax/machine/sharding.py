"""How arrays are sharded: one mesh over all devices, and rules from a leaf's path to its sharding.

The mesh has three axes. `data` and `fsdp` shard the batch. `fsdp` also shards every parameter; it
is all-gathered where it is used (Zhao et al. 2023, https://arxiv.org/abs/2304.11277). `tensor`
shards the heads and the width of the MLP (Shoeybi et al. 2019, https://arxiv.org/abs/1909.08053).
The optimizer state and the EMA can be sharded over `data` too (ZeRO-1, Rajbhandari et al. 2020,
https://arxiv.org/abs/1910.02054).

Shapes: L layers, N batch, D hidden size, F features of a modulation.
"""

import math
import re

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.tree_util import DictKey

from dit_jax import compat, settings
from dit_jax.errors import UserError
from dit_jax.machine import words

AXES = ("data", "fsdp", "tensor")
BATCH = PartitionSpec(("data", "fsdp"))
TENSOR = {  # path of a parameter within the blocks: the axis, from the end, that `tensor` shards
    r"attn/(qkv|q|kv)/(kernel|bias)": -1,  # whole heads
    r"attn/proj/kernel": -2,
    r"mlp/fc1/(kernel|bias)": -1,
    r"mlp/fc2/kernel": -2,
    r"adaLN_modulation/(kernel|bias)": -1,
}

ACTIVATIONS = {  # the shardings that `gather` gives an activation, one after another
    # (L, N, 1, F). Memory-bound: N rows against (L, D, F) weights. So F is computed where its
    # weights are; then the rows go to their devices, and last F is gathered over `tensor`.
    "modulation": [
        (None, ("data",), None, ("tensor", "fsdp")),
        (None, ("data", "fsdp"), None, ("tensor",)),
        (None, ("data", "fsdp")),
    ],
    "chunks": [(None, ("data", "fsdp"), None, None, ("tensor",))],  # (L, N, 1, chunks, D)
}


def make_mesh(*, data=-1, fsdp=1, tensor=1, devices=None):
    """The mesh over all devices, or over `devices`; an axis of -1 gets the remaining devices.

    Devices along `tensor` are the closest neighbours in hardware, then those along `fsdp`. With
    several TPU slices, only `data` crosses slices. UserError if the sizes do not fit the devices.
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
    return Mesh(compat.hybrid_device_grid(inner, slices, devices), AXES, axis_types=types)


def _fill(shape, count):
    """The shape of the mesh with -1 replaced, so that it has `count` devices."""
    settings.check_mesh(**dict(zip(AXES, shape, strict=True)))
    product = math.prod(size for size in shape if size != -1)
    rest = count // product
    full = tuple(rest if size == -1 else size for size in shape)
    if math.prod(full) != count:
        text = " x ".join(f"{name} {size}" for name, size in zip(AXES, shape, strict=True))
        wrong = f"{product} does not divide {count}" if -1 in shape else f"these are {product}"
        raise UserError(f"mesh must be of {words.count(count, 'device')}, got {text}: {wrong}")
    return full


def of_batch(mesh):
    """The sharding of a batch: its leading axis over `data` and `fsdp`."""
    return NamedSharding(mesh, BATCH)


def batch_shards(mesh):
    """The number of shards of a batch."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def replicated(mesh):
    return NamedSharding(mesh, PartitionSpec())


def of_params(tree, mesh, *, over_data=False):
    """The shardings of parameters, or of a tree that contains them, such as an optimizer state.

    Each mesh axis shards the largest remaining divisible dimension of a leaf, avoiding very narrow
    shards. If no dimension is divisible, the leaf is replicated along that axis. over_data: shard
    over `data` too.
    """
    axes = ("fsdp", "data") if over_data else ("fsdp",)
    return _map_names(lambda name, x: NamedSharding(mesh, _spec(name, x.shape, mesh, axes)), tree)


def make_gather(mesh):
    """gather(tree, dtype): all-gathers named arrays over `fsdp` and casts them to dtype.

    tree is a nested dict with the paths of a DiT, where `blocks` holds a single block. It casts
    first, so parameters and their gradients are sent in dtype. An array named in ACTIVATIONS gets
    its shardings instead and is not cast. None if the mesh shards no parameter.
    """
    if mesh.shape["fsdp"] == mesh.shape["tensor"] == 1:
        return None

    def gather(tree, dtype):
        def constrain(name, x):
            if name not in ACTIVATIONS:
                sharding = NamedSharding(mesh, _spec(name, x.shape, mesh, ()))
                return jax.lax.with_sharding_constraint(x.astype(dtype), sharding)
            for spec in ACTIVATIONS[name]:
                sharding = NamedSharding(mesh, _even(spec, x.shape, mesh))
                x = jax.lax.with_sharding_constraint(x, sharding)
            return x

        return _map_names(constrain, tree)

    return gather


def _map_names(function, tree):
    """Maps function(name, leaf) over a tree; a name looks like blocks/attn/qkv/kernel."""

    def call(path, x):
        return function("/".join(key.key for key in path if isinstance(key, DictKey)), x)

    return jax.tree_util.tree_map_with_path(call, tree)


def _spec(name, shape, mesh, axes):
    """The PartitionSpec of a leaf: over `tensor` as TENSOR says, then over the mesh axes `axes`."""
    divided = {}  # axis of the array: axes of the mesh
    is_block = "blocks" in name.split("/")  # Muon's state has names before it
    for pattern, axis in TENSOR.items():
        if is_block and mesh.shape["tensor"] > 1 and re.search(f"{pattern}$", name):
            divided[len(shape) + axis] = ("tensor",)

    def shard_size(axis):
        return shape[axis] // math.prod(mesh.shape[name] for name in divided.get(axis, ()))

    first = 1 if is_block else 0  # a scan walks along the axis of layers, so it is never sharded
    for mesh_axis in (mesh_axis for mesh_axis in axes if mesh.shape[mesh_axis] > 1):
        for axis in sorted(range(first, len(shape)), key=shard_size, reverse=True):
            if shard_size(axis) % mesh.shape[mesh_axis] == 0:
                divided[axis] = (*divided.get(axis, ()), mesh_axis)
                break
    return PartitionSpec(*(divided.get(axis) for axis in range(len(shape))))


def _even(spec, shape, mesh):
    """The PartitionSpec without the entries that would not divide the shape evenly."""
    parts = [math.prod(mesh.shape[name] for name in names or ()) for names in spec]
    entries = zip(spec, parts, shape, strict=False)
    return PartitionSpec(*(None if size % count else names for names, count, size in entries))


def abstract(tree, shardings):
    """The tree as ShapeDtypeStructs with these shardings: the template of a restore."""
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        tree,
        shardings,
    )


def local_rows(sharding, count):
    """The rows of a batch of `count` that are on this process's devices, ascending."""
    return sorted(row for rows in _local_ranges(sharding, count) for row in rows)


def count_local_rows(sharding, count):
    """The number of `local_rows`, also where a list of them would not fit into memory."""
    return sum(map(len, _local_ranges(sharding, count)))


def _local_ranges(sharding, count):
    indices = sharding.addressable_devices_indices_map((count,)).values()
    return {range(*rows.indices(count)) for (rows,) in indices}


def to_global(x, sharding):
    """The global array with this sharding; x is a NumPy array, the same on every process."""
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def from_local_rows(x, rows, count, sharding):
    """The global array (count, ...); on every process x holds its rows, `local_rows`."""

    def read(index):
        start, stop, _ = index[0].indices(count)
        first = rows.index(start)
        return x[first : first + stop - start]

    return jax.make_array_from_callback((count, *x.shape[1:]), sharding, read)


def to_host(x):
    """The whole global array as NumPy, on every process."""
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    # Two programs at a time that wait for other processes can deadlock the threads of a CPU.
    jax.block_until_ready(x)
    return compat.process_allgather(x, tiled=True)
