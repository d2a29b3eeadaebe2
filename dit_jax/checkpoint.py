"""Checkpoints: Orbax step directories that hold trees of arrays and one JSON item, `meta`.

DIR/STEP/ has an item for every tree and `meta`, which carries what the caller gives (`model`, the
architecture, and `config`, how to compute, noise and sample with it; or `vae`, the architecture of
an autoencoder) and what this module adds: the step, the versions of the packages and a digest of
every leaf.
"""

import asyncio
import importlib.metadata

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.tree_util import keystr

from dit_jax import disk

ITEMS = ("params", "ema", "opt_state")  # trees; meta is JSON
KINDS = {"model": "a DiT", "vae": "an autoencoder"}  # names in meta of an architecture
COMMIT = "commit_success.txt"  # Orbax's last object of a step in a bucket
PACKAGES = ("dit_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


class Damaged(ValueError):
    """What was saved cannot be read, or is not what was saved; the message names the step."""


def open_manager(directory, *, keep=2, background=True):
    """An Orbax manager that keeps the newest `keep` steps.

    background: a save goes on while the caller does; it takes a copy of what is saved.
    """
    options = ocp.CheckpointManagerOptions(
        preservation_policy=ocp.checkpoint_managers.LatestN(keep),
        enable_async_checkpointing=background,
    )
    handlers = {name: _writer() for name in ITEMS} | {"meta": ocp.JsonCheckpointHandler()}
    path = disk.absolute(directory)
    return ocp.CheckpointManager(path, options=options, item_handlers=handlers)


def save(manager, step, items, meta):
    """Starts to save `items`, a dict of trees, and `meta`, a JSON dict, as number `step`.

    Returns when the arrays are copied: they may be donated then. `manager.wait_until_finished()`
    and `manager.close()` wait for the disk.
    """
    meta = meta | {
        "step": step,
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "digests": {name: digest(tree) for name, tree in items.items()},
    }
    trees = {name: ocp.args.PyTreeSave(tree) for name, tree in items.items()}
    manager.save(step, args=ocp.args.Composite(**trees, meta=ocp.args.JsonSave(meta)), force=True)


def latest_step(directory):
    """The newest step saved in a directory, None where there is none."""
    return max(_steps(directory), default=None)


def oldest_step(directory):
    """The oldest step saved in a directory, None where there is none."""
    return min(_steps(directory), default=None)


def _steps(directory):
    paths = disk.children(disk.path(directory))
    return [int(path.name) for path in paths if _is_complete(path)]


def set_aside(directory, step):
    """Moves a step to damaged/STEP beside the directory of the steps; returns where it is then."""
    directory = disk.path(directory)
    place = directory.parent / "damaged"
    place.mkdir(exist_ok=True)
    target = place / str(step)
    while disk.exists(target):
        target = target.with_name(f"{target.name}-again")
    disk.move(directory / str(step), target)
    return target


def locate(path):
    """(directory of the steps, a step) of a training run or of a converted checkpoint.

    The step is the newest one, or the one whose own folder `path` is.
    """
    path = disk.path(path)
    if _is_complete(path):
        return path.parent, int(path.name)
    inside = path / "checkpoints"
    directory = inside if disk.exists(inside) else path
    step = latest_step(directory)
    if step is None:
        raise ValueError(f"checkpoint must be a directory with a saved step, got {path}")
    return directory, step


def read_meta(directory, step, *, of=None):
    """The JSON item of a step; of: the name in `KINDS` of what the checkpoint must be."""
    meta = _restore(directory, step, {}, meta=ocp.args.JsonRestore())["meta"]
    if not isinstance(meta, dict) or "digests" not in meta:
        raise Damaged(
            f"checkpoint {disk.path(directory) / str(step)} is damaged: its meta is empty"
        )
    if of and of not in meta:
        raise ValueError(
            f"checkpoint must be one of {KINDS[of]}, got {disk.path(directory) / str(step)}"
        )
    return meta


def restore(directory, step, templates):
    """The items of a step named in `templates`, each a tree of ShapeDtypeStruct with shardings.

    Raises Damaged where an item cannot be read or has not the digest, shape and type of its save.
    """
    digests = read_meta(directory, step)["digests"]
    for name in templates:
        if name not in digests:
            raise ValueError(f"weights must be of {', '.join(digests)} in {directory}, got {name}")
    args = {
        name: ocp.args.PyTreeRestore(
            tree, restore_args=ocp.checkpoint_utils.construct_restore_args(tree)
        )
        for name, tree in templates.items()
    }
    handlers = {name: _reader(tree) for name, tree in templates.items()}
    items = _restore(directory, step, handlers, **args)
    for name, tree in items.items():
        for leaf, found in digest(tree).items():
            if digests[name].get(leaf) != found:
                raise Damaged(
                    f"checkpoint {disk.path(directory) / str(step)} is damaged: {name}{leaf} has "
                    f"digest {found}, but {digests[name].get(leaf)} was saved"
                )
    return items


def digest(tree):
    """{path of a leaf: 16 hex digits}, the same for an array however it is sharded.

    Two sums modulo 2^32 of the leaf's words, each word times an odd number made from its place:
    a change of one bit always changes both.
    """
    digests = {}
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        # One after the other: leaves of one shape share a program, one at a time goes to a device,
        # and processes that have several sums under way wait for each other in vain on CPUs.
        digests[keystr(path)] = "".join(f"{word:08x}" for word in np.asarray(_sums(x)))
    return digests


@jax.jit
def _sums(x):
    words = x if x.dtype == jnp.uint32 else x.view(f"uint{8 * x.dtype.itemsize}")
    words = words.astype(jnp.uint32)
    place = jnp.zeros(x.shape, jnp.uint32)
    for axis, extent in enumerate(x.shape):
        step = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        place = place * jnp.uint32(extent) + step
    mixed = (place ^ (place >> 15)) * jnp.uint32(0x9E3779B1)
    terms = (words * (2 * place + 1), words * (mixed | jnp.uint32(1)))

    def add(a, b):
        return a[0] + b[0], a[1] + b[1]

    # One reduction of both is fused with what it adds; a sum each keeps two arrays of the leaf's
    # size and takes 20 times as long on a CPU.
    return jnp.stack(jax.lax.reduce(terms, (jnp.uint32(0),) * 2, add, range(x.ndim)))


class _WholeReads(ocp.type_handlers.ArrayHandler):
    """Reads arrays, and lets every read end where one fails.

    Orbax closes the event loop at the first failure: what still reads then complains into it.
    """

    async def deserialize(self, infos, args=None):
        before = asyncio.all_tasks()
        try:
            return await super().deserialize(infos, args)
        except Exception:
            if reads := asyncio.all_tasks() - before:
                await asyncio.wait(reads)
            raise


def _writer():
    # Compression takes most of the time of a save and its memory, and saves 8 % of such floats.
    return ocp.PyTreeCheckpointHandler(use_compression=False)


def _reader(template):
    # What is being read is in memory twice: no more at once than the largest leaf, or 200 MB.
    largest = max((x.size * x.dtype.itemsize for x in jax.tree.leaves(template)), default=0)
    return ocp.PyTreeCheckpointHandler(
        restore_concurrent_gb=max(0.2, 1.01 * largest / 1e9),  # must be above what is asked for
        type_handler_registry=ocp.type_handlers.create_type_handler_registry(
            (jax.Array, _WholeReads())
        ),
    )


def _is_complete(path):
    # On a disk a step gets its name when all is in it; in a bucket this file, last.
    last = "_CHECKPOINT_METADATA" if disk.is_on_disk(path) else COMMIT
    return path.name.isdecimal() and disk.exists(path / last)


def _restore(directory, step, handlers, **args):
    path = disk.absolute(directory) / str(step)
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler(**handlers)) as checkpointer:
            return dict(checkpointer.restore(path, args=ocp.args.Composite(**args)))
    except Exception as error:  # Orbax raises even that, where a file is cut short
        cause = error
        while cause.__cause__ is not None:  # Orbax's own text says which slice, TensorStore's why
            cause = cause.__cause__
        reason = " ".join(str(cause).split())[:200]
        if not disk.is_on_disk(path) and disk.is_refusal(cause):  # it may be whole all the same
            raise OSError(f"checkpoint {path} cannot be reached: {reason}") from error
        raise Damaged(f"checkpoint {path} cannot be read: {reason}") from error
