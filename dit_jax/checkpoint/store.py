"""Checkpoints: Orbax step directories that hold trees of arrays and one JSON item, `meta`.

DIR/STEP/ has one item for every tree and `meta`. The caller gives `model`, the architecture, and
`config`, the settings; or `vae`, the architecture of an autoencoder; or `inception`, the origin of
its weights; or `classifier`, its architecture and what it was fitted to. This module adds the step,
the versions of the packages, a digest of every leaf, and a digest of meta itself.
"""

import hashlib
import importlib.metadata
import json
import re

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.tree_util import keystr

from dit_jax import compat
from dit_jax.checkpoint import digests, peek
from dit_jax.errors import UserError
from dit_jax.machine import disk, sharding

ITEMS = ("params", "ema", "opt_state", "averages")  # the trees
PACKAGES = ("dit_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


class Damaged(UserError):
    """A checkpoint is unreadable or corrupt; the message names the step."""


def open_writer(*, background=True, barrier=None, alone=False):
    """An Orbax checkpointer for `save`; close it after use.

    background: saves run in threads, on a copy of the arrays. barrier(**options): how several
    processes wait for each other then; None: Orbax's own. alone: process 0 saves NumPy arrays and
    waits for no other; not in the background.
    """
    processes = ocp.options.MultiprocessingOptions(active_processes={0} if alone else None)
    # Compression would take most of a save's time and memory, and saves 8 % of such floats.
    options = {"use_compression": False, "multiprocessing_options": processes}
    trees = {name: ocp.PyTreeCheckpointHandler(**options) for name in ITEMS}
    meta = ocp.JsonCheckpointHandler(multiprocessing_options=processes)
    options = ocp.CompositeOptions(multiprocessing_options=processes)
    handler = ocp.CompositeCheckpointHandler(composite_options=options, **trees, meta=meta)
    if not background:
        return ocp.Checkpointer(handler, multiprocessing_options=processes)
    options = ocp.AsyncOptions(barrier_sync_fn=barrier)
    return ocp.AsyncCheckpointer(handler, async_options=options)


def save(writer, directory, step, items, meta):
    """Saves `items`, a dict of trees, and `meta`, a JSON dict, as number `step`; atomic.

    A background writer returns when the arrays are copied, so they may be donated;
    `writer.wait_until_finished()` and `writer.close()` wait for the disk.
    """
    meta = meta | {
        "step": step,
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "digests": {name: digests.of_tree(tree) for name, tree in items.items()},
    }
    trees = {name: ocp.args.PyTreeSave(tree) for name, tree in items.items()}
    meta = ocp.args.JsonSave(meta | {"sha256": peek.sha256(meta)})
    path = disk.absolute(directory) / str(step)
    writer.save(path, args=ocp.args.Composite(**trees, meta=meta), force=True)


def digest(meta, item):
    """A sha256 of the leaves of an item, from the meta of its step."""
    return hashlib.sha256(
        json.dumps(meta["digests"].get(item), sort_keys=True).encode()
    ).hexdigest()


def read_meta(directory, step, *, of=None):
    """The JSON item of a step.

    of: a name in `peek.KINDS`; UserError if meta does not describe that.
    """
    path = disk.path(directory) / str(step)
    meta = _read(path, "meta", ocp.JsonCheckpointHandler(), ocp.args.JsonRestore())
    if not isinstance(meta, dict) or "digests" not in meta:
        raise Damaged(f"checkpoint {path} is damaged: its meta is empty")
    if meta.pop("sha256", None) not in (None, peek.sha256(meta)):
        raise Damaged(f"checkpoint {path} is damaged: its meta differs from what was saved")
    if meta["step"] != int(step):
        raise Damaged(f"checkpoint {path} is damaged: it was saved as step {meta['step']}")
    if of:
        peek.check_kind(meta, path, of)
    return meta


def restore(directory, step, templates, *, verify=True):
    """The items of a step named in `templates`, each a tree of ShapeDtypeStruct with shardings.

    Raises Damaged if an item cannot be read or differs in shape, dtype or digest from its save.
    verify=False: digests are not compared.
    """
    path = disk.path(directory) / str(step)
    saved = read_meta(directory, step)["digests"]
    for name in templates:
        if name not in saved:
            raise UserError(f"weights must be of {', '.join(saved)} in {directory}, got {name}")
    items = {}
    for name, tree in templates.items():
        shardings = ocp.checkpoint_utils.construct_restore_args(tree)
        args = ocp.args.PyTreeRestore(tree, restore_args=shardings)
        items[name] = _read(path, name, compat.tree_reader(tree), args)
    if verify:
        compare(path, items, saved)
    return items


def restore_params(directory, step, init, *, weights, mesh, verify=True):
    """The parameters of a step, sharded over the mesh.

    init() -> params gives the shapes; it is not run. weights: the item, "params" or "ema". Raises
    UserError if there is no such item, and Damaged as `restore`, to which `verify` goes.
    """
    template = jax.eval_shape(init)
    template = sharding.abstract(template, sharding.of_params(template, mesh))
    return restore(directory, step, {weights: template}, verify=verify)[weights]


def compare(path, items, saved):
    """Raises Damaged if a leaf of the items, read from a step's path, differs from its digest.

    Every process must call it; all find the same.
    """
    for name, tree in items.items():
        for leaf, found in digests.of_tree(tree).items():
            _compare(path, f"{name}{leaf}", found, saved[name].get(leaf))


def verify(directory, step, *, share=(0, 1)):
    """Reads a step leaf by leaf to NumPy; raises Damaged if a leaf is unreadable or corrupt.

    share: (i, n) reads only the i-th of n parts of the leaves.
    """
    path = disk.path(directory) / str(step)
    saved = read_meta(directory, step)["digests"]
    leaves = [(name, leaf) for name in saved for leaf in saved[name]]
    readers = {name: _read_leaves(path, name, saved[name]) for name in saved}
    for name, leaf in leaves[share[0] :: share[1]]:
        readers[name](leaf)


def open_leaves(directory, step, name):
    """read(leaf) -> a leaf of an item as NumPy, by its path in the digests; Damaged as `verify`."""
    saved = read_meta(directory, step)["digests"][name]
    return _read_leaves(disk.path(directory) / str(step), name, saved)


def _compare(path, leaf, found, saved):
    if found != saved:
        raise Damaged(
            f"checkpoint {path} is damaged: {leaf} has digest {found}, but {saved} was saved"
        )


def _read_leaves(path, name, saved):
    """read(leaf) -> the array of a leaf of an item, by its path in the digests `saved` of it."""
    handler = compat.tree_reader()
    tree = _guard(path, lambda: handler.metadata(_for_orbax(path) / name).tree)
    paths = {_words(leaf): leaf for leaf, _ in jax.tree.leaves_with_path(tree)}
    args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)

    def read(leaf):
        if _words(leaf) not in paths:
            raise Damaged(f"checkpoint {path} is damaged: {name}{leaf} is missing")
        one = jax.tree_util.tree_map_with_path(
            lambda each, x: x if each == paths[_words(leaf)] else ocp.PLACEHOLDER, tree
        )
        found = _read(path, name, handler, ocp.args.PyTreeRestore(one, restore_args=args))
        array = next(x for x in jax.tree.leaves(found) if x is not ocp.PLACEHOLDER)
        _compare(path, f"{name}{leaf}", digests.of_array(array), saved[leaf])
        return array

    return read


def _words(leaf):
    """A leaf's path as words: a NamedTuple is read back as a dict, with other brackets."""
    return tuple(re.findall(r"\w+", leaf if isinstance(leaf, str) else keystr(leaf)))


def _read(path, name, handler, args):
    # Not with a Checkpointer: it would wait for other processes, and one of them may have failed.
    return _guard(path, lambda: handler.restore(_for_orbax(path) / name, args=args))


def _for_orbax(path):
    return epath.Path(disk.absolute(path))


def _guard(path, read):
    try:
        return read()
    except Exception as error:  # Orbax raises many types, a plain Exception for truncated files
        in_bucket = not disk.is_on_disk(path)
        if in_bucket and disk.is_refusal(_root(error)):  # the checkpoint itself may be intact
            raise OSError(f"checkpoint {path} cannot be reached: {explain(error)}") from error
        raise Damaged(f"checkpoint {path} cannot be read: {explain(error)}") from error


def _root(error):
    """The first cause: Orbax's text names the slice, TensorStore's the reason."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def explain(error):
    """Why Orbax could not read or write, in one line."""
    if isinstance(error, Damaged):  # it is one line already
        return str(error)
    error = _root(error)
    text = re.sub(r"\s*\[\w+='.*$", "", " ".join(str(error).split()))
    # TensorStore names the kind of error first and the reason last.
    return text if len(text) <= 200 else f"{text.partition(':')[0][:50]}: ... {text[-150:]}"
