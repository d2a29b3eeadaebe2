"""Checkpoints: Orbax step directories that hold trees of arrays and one JSON item, `meta`.

DIR/STEP/ has an item for every tree and `meta`, which carries what the caller gives (`model`, the
architecture, and `config`, how to compute, noise and sample with it; or `vae`, the architecture of
an autoencoder) and what this module adds: the step, the versions of the packages, a digest of every
leaf and one of meta itself.
"""

import asyncio
import hashlib
import importlib.metadata
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.tree_util import keystr

from dit_jax import disk

ITEMS = ("params", "ema", "opt_state")  # trees; meta is JSON
KINDS = {"model": "a DiT", "vae": "an autoencoder"}  # names in meta of an architecture
COMMIT = "commit_success.txt"  # Orbax's last object of a step in a bucket
BLOCK = 2**16  # words that a digest takes at a time: they stay in the cache of a core
PACKAGES = ("dit_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


class Damaged(ValueError):
    """What was saved cannot be read, or is not what was saved; the message names the step."""


def open_writer(*, background=True, barrier=None):
    """What `save` writes with, an Orbax checkpointer; it has to be closed.

    background: a save goes on while the caller does; it takes a copy of what is saved. barrier: by
    which several processes then wait for each other, Orbax's own where it is None.
    """
    # Compression takes most of the time of a save and its memory, and saves 8 % of such floats.
    trees = {name: ocp.PyTreeCheckpointHandler(use_compression=False) for name in ITEMS}
    handler = ocp.CompositeCheckpointHandler(**trees, meta=ocp.JsonCheckpointHandler())
    if not background:
        return ocp.Checkpointer(handler)
    options = ocp.AsyncOptions(barrier_sync_fn=barrier)
    return ocp.AsyncCheckpointer(handler, async_options=options)


def save(writer, directory, step, items, meta):
    """Saves `items`, a dict of trees, and `meta`, a JSON dict, as number `step`, whole or not.

    A writer in the background returns when the arrays are copied: they may be donated then, and
    `wait_until_finished()` and `close()` of the writer wait for the disk.
    """
    meta = meta | {
        "step": step,
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "digests": {name: digest(tree) for name, tree in items.items()},
    }
    trees = {name: ocp.args.PyTreeSave(tree) for name, tree in items.items()}
    meta = ocp.args.JsonSave(meta | {"sha256": _digest_of_meta(meta)})
    path = disk.absolute(directory) / str(step)
    writer.save(path, args=ocp.args.Composite(**trees, meta=meta), force=True)


def _digest_of_meta(meta):
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def latest_step(directory):
    """The newest step saved in a directory, None where there is none."""
    return max(steps(directory), default=None)


def steps(directory):
    """The steps saved in a directory, ascending."""
    paths = disk.children(disk.path(directory))
    return sorted(int(path.name) for path in paths if is_complete(path))


def is_complete(path):
    """Whether a path is the folder of a step of which everything is there."""
    # On a disk a step gets its name when all is in it; in a bucket this file, last.
    last = "_CHECKPOINT_METADATA" if disk.is_on_disk(path) else COMMIT
    return path.name.isdecimal() and disk.exists(path / last)


def broken(directory):
    """The steps in a directory on a disk, ascending, of which something is missing."""
    paths = [path for path in disk.children(disk.path(directory)) if disk.is_on_disk(path)]
    return sorted(int(p.name) for p in paths if p.name.isdecimal() and not is_complete(p))


def delete(directory, step):
    """Deletes a step: at once it is none, whatever happens meanwhile."""
    path = disk.path(directory) / str(step)
    if disk.is_on_disk(path):
        path = path.rename(path.with_name(f".deleted-{step}"))
        shutil.rmtree(path, ignore_errors=True)
    else:
        (path / COMMIT).unlink()
        path.rmtree()


def clean(directory):
    """Deletes what saves and deletions that were cut off have left."""
    for path in disk.children(disk.path(directory)):
        if disk.is_on_disk(path):
            if path.name.startswith(".deleted-") or ".orbax-checkpoint-tmp" in path.name:
                shutil.rmtree(path, ignore_errors=True)
        elif path.name.isdecimal() and not is_complete(path):
            path.rmtree()


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
    if is_complete(path):
        return path.parent, int(path.name)
    inside = path / "checkpoints"
    directory = inside if disk.exists(inside) else path
    step = latest_step(directory)
    if step is None:
        raise ValueError(f"checkpoint must be a directory with a saved step, got {path}")
    return directory, step


def read_meta(directory, step, *, of=None):
    """The JSON item of a step; of: the name in `KINDS` of what the checkpoint must be."""
    path = disk.path(directory) / str(step)
    meta = _read(path, "meta", ocp.JsonCheckpointHandler(), ocp.args.JsonRestore())
    if not isinstance(meta, dict) or "digests" not in meta:
        raise Damaged(f"checkpoint {path} is damaged: its meta is empty")
    if meta.pop("sha256", None) not in (None, _digest_of_meta(meta)):
        raise Damaged(f"checkpoint {path} is damaged: its meta is not what was saved")
    if meta["step"] != int(step):
        raise Damaged(f"checkpoint {path} is damaged: it was saved as step {meta['step']}")
    if of and of not in meta:
        raise ValueError(f"checkpoint must be one of {KINDS[of]}, got {path}")
    return meta


def restore(directory, step, templates, *, verify=True):
    """The items of a step named in `templates`, each a tree of ShapeDtypeStruct with shardings.

    Raises Damaged where an item cannot be read or has not the digest, shape and type of its save;
    without verify, digests are not compared.
    """
    path = disk.path(directory) / str(step)
    digests = read_meta(directory, step)["digests"]
    for name in templates:
        if name not in digests:
            raise ValueError(f"weights must be of {', '.join(digests)} in {directory}, got {name}")
    items = {}
    for name, tree in templates.items():
        places = ocp.checkpoint_utils.construct_restore_args(tree)
        args = ocp.args.PyTreeRestore(tree, restore_args=places)
        items[name] = _read(path, name, _reader(tree), args)
    if verify:
        compare(path, items, digests)
    return items


def compare(path, items, digests):
    """Raises Damaged where a leaf of the items, read from a step's path, has another digest.

    Of several processes all find the same, and all have to call it.
    """
    for name, tree in items.items():
        for leaf, found in digest(tree).items():
            _compare(path, f"{name}{leaf}", found, digests[name].get(leaf))


def verify(directory, step, *, share=(0, 1)):
    """Reads a step leaf by leaf, without devices; raises Damaged where one is not as it was saved.

    share: (i, n), the i-th of n parts of the leaves only.
    """
    path = disk.path(directory) / str(step)
    digests = read_meta(directory, step)["digests"]
    leaves = [(name, leaf) for name in digests for leaf in digests[name]]
    readers = {name: _read_leaves(path, name) for name in digests}
    for name, leaf in leaves[share[0] :: share[1]]:
        found = digest_on_host(readers[name](leaf))
        _compare(path, f"{name}{leaf}", found, digests[name][leaf])


def _compare(path, leaf, found, saved):
    if found != saved:
        raise Damaged(
            f"checkpoint {path} is damaged: {leaf} has digest {found}, but {saved} was saved"
        )


def _read_leaves(path, name):
    """read(leaf), the array of a leaf of an item, by its path in the tree that was saved."""
    handler = _reader()
    tree = _guard(path, lambda: handler.metadata(_for_orbax(path) / name).tree)
    places = {_words(place): place for place, _ in jax.tree.leaves_with_path(tree)}
    args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)

    def read(leaf):
        if _words(leaf) not in places:
            raise Damaged(f"checkpoint {path} is damaged: {name}{leaf} is missing")
        one = jax.tree_util.tree_map_with_path(
            lambda place, x: x if place == places[_words(leaf)] else ocp.PLACEHOLDER, tree
        )
        found = _read(path, name, handler, ocp.args.PyTreeRestore(one, restore_args=args))
        return next(x for x in jax.tree.leaves(found) if x is not ocp.PLACEHOLDER)

    return read


def _words(place):
    """A leaf's path without brackets: a tuple with names comes back from the disk as a dict."""
    return tuple(re.findall(r"\w+", place if isinstance(place, str) else keystr(place)))


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


def digest_on_host(x):
    """The digest of one NumPy array."""
    words, sums = x.reshape(-1).view(f"uint{8 * x.dtype.itemsize}"), np.zeros(2, np.uint32)
    for start in range(0, words.size, BLOCK):
        block = words[start : start + BLOCK].astype(np.uint32)
        place = np.arange(start, start + block.size).astype(np.uint32)
        mixed = (place ^ (place >> 15)) * np.uint32(0x9E3779B1)
        factors = 2 * place + 1, mixed | np.uint32(1)
        sums += [(block * factor).sum(dtype=np.uint32) for factor in factors]
    return "".join(f"{word:08x}" for word in sums)


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


class _WholeReads:
    """Reads arrays, and lets every read end where one fails.

    Orbax closes the event loop at the first failure: what still reads then complains into it.
    """

    async def deserialize(self, infos, args=None):
        return await self._whole(super().deserialize(infos, args))

    async def metadata(self, infos):
        return await self._whole(super().metadata(infos))

    async def _whole(self, reading):
        before = asyncio.all_tasks()
        try:
            return await reading
        except Exception:
            if reads := asyncio.all_tasks() - before:
                await asyncio.wait(reads)
            raise


class _DeviceReads(_WholeReads, ocp.type_handlers.ArrayHandler):
    """To the devices."""


class _HostReads(_WholeReads, ocp.type_handlers.NumpyHandler):
    """To NumPy."""


def _reader(template=None):
    # What is being read is in memory twice: no more at once than the largest leaf, or 200 MB.
    largest = max((x.size * x.dtype.itemsize for x in jax.tree.leaves(template)), default=0)
    return ocp.PyTreeCheckpointHandler(
        restore_concurrent_gb=max(0.2, 1.01 * largest / 1e9),  # must be above what is asked for
        type_handler_registry=ocp.type_handlers.create_type_handler_registry(
            (jax.Array, _DeviceReads()), (np.ndarray, _HostReads())
        ),
    )


def _read(path, name, handler, args):
    # Not by a Checkpointer: it waits for the other processes, of which one may have failed.
    return _guard(path, lambda: handler.restore(_for_orbax(path) / name, args=args))


def _for_orbax(path):
    return epath.Path(disk.absolute(path))


def _guard(path, read):
    try:
        return read()
    except Exception as error:  # Orbax raises even that, where a file is cut short
        in_bucket = not disk.is_on_disk(path)
        if in_bucket and disk.is_refusal(_root(error)):  # it may be whole all the same
            raise OSError(f"checkpoint {path} cannot be reached: {explain(error)}") from error
        raise Damaged(f"checkpoint {path} cannot be read: {explain(error)}") from error


def _root(error):
    """The first cause: Orbax's own text says which slice, TensorStore's why."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def explain(error):
    """Why Orbax could not read or write, in a line."""
    if isinstance(error, Damaged):  # says it already
        return str(error)
    error = _root(error)
    text = re.sub(r"\s*\[\w+='.*$", "", " ".join(str(error).split()))
    # TensorStore says of which kind it is first, and why at the end.
    return text if len(text) <= 200 else f"{text.partition(':')[0][:50]}: ... {text[-150:]}"
