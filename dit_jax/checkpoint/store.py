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

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.tree_util import keystr

from dit_jax.checkpoint import digests
from dit_jax.errors import UserError
from dit_jax.machine import disk, sharding

ITEMS = ("params", "ema", "opt_state")  # trees; meta is JSON
KINDS = {"model": "a DiT", "vae": "an autoencoder"}  # names in meta of an architecture
PACKAGES = ("dit_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


class Damaged(UserError):
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
        "digests": {name: digests.of_tree(tree) for name, tree in items.items()},
    }
    trees = {name: ocp.args.PyTreeSave(tree) for name, tree in items.items()}
    meta = ocp.args.JsonSave(meta | {"sha256": _digest_of_meta(meta)})
    path = disk.absolute(directory) / str(step)
    writer.save(path, args=ocp.args.Composite(**trees, meta=meta), force=True)


def _digest_of_meta(meta):
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


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
        raise UserError(f"checkpoint must be one of {KINDS[of]}, got {path}")
    return meta


def restore(directory, step, templates, *, verify=True):
    """The items of a step named in `templates`, each a tree of ShapeDtypeStruct with shardings.

    Raises Damaged where an item cannot be read or has not the digest, shape and type of its save;
    without verify, digests are not compared.
    """
    path = disk.path(directory) / str(step)
    saved = read_meta(directory, step)["digests"]
    for name in templates:
        if name not in saved:
            raise UserError(f"weights must be of {', '.join(saved)} in {directory}, got {name}")
    items = {}
    for name, tree in templates.items():
        places = ocp.checkpoint_utils.construct_restore_args(tree)
        args = ocp.args.PyTreeRestore(tree, restore_args=places)
        items[name] = _read(path, name, _reader(tree), args)
    if verify:
        compare(path, items, saved)
    return items


def restore_params(directory, step, init, *, weights, mesh):
    """The parameters that `init() -> params` has the shapes of, sharded over the mesh."""
    template = jax.eval_shape(init)
    template = sharding.abstract(template, sharding.of_params(template, mesh))
    return restore(directory, step, {weights: template})[weights]


def compare(path, items, saved):
    """Raises Damaged where a leaf of the items, read from a step's path, has another digest.

    Of several processes all find the same, and all have to call it.
    """
    for name, tree in items.items():
        for leaf, found in digests.of_tree(tree).items():
            _compare(path, f"{name}{leaf}", found, saved[name].get(leaf))


def verify(directory, step, *, share=(0, 1)):
    """Reads a step leaf by leaf, without devices; raises Damaged where one is not as it was saved.

    share: (i, n), the i-th of n parts of the leaves only.
    """
    path = disk.path(directory) / str(step)
    saved = read_meta(directory, step)["digests"]
    leaves = [(name, leaf) for name in saved for leaf in saved[name]]
    readers = {name: _read_leaves(path, name) for name in saved}
    for name, leaf in leaves[share[0] :: share[1]]:
        found = digests.of_array(readers[name](leaf))
        _compare(path, f"{name}{leaf}", found, saved[name][leaf])


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
