"""Averages of a run that are chosen after it: snapshots while it trains, checkpoints afterwards.

Snapshots are in WORKDIR/averages/STEP, one tree for each tracked width, and are never deleted.
"""

import re

import jax
import numpy as np
from absl import logging
from flax import traverse_util

from dit_jax.checkpoint import steps, store
from dit_jax.errors import UserError
from dit_jax.machine import cluster, disk
from dit_jax.runs import keep, snapshots

OF_RUN = ("model", "config", "class_names", "vae_digests", "data_sha256", "init_from")  # in meta


class Saver:
    """Saves the averages of a run every `every` steps, in the background.

    about: what the meta of each snapshot says of the run. Every process must call every method.
    """

    def __init__(self, settings, about, workdir):
        self.every, self._last = settings.train.ema_snapshot_every, settings.run.total_steps
        self._meta = about | {"ema_widths": list(settings.train.averages)}
        self._directory, self._newest = workdir / snapshots.FOLDER, None
        verify = settings.run.verify_checkpoints
        with cluster.together():
            self._keeper = keep.Keeper(self._directory, newest=None, verify=verify)

    def begin(self, state):
        """Deletes snapshots of later steps, which will be repeated; saves a missing one of this."""
        step, missing = int(state.step), False
        with cluster.together():
            if jax.process_index() == 0:
                saved = steps.saved(self._directory)
                for later in (each for each in saved if each > step):
                    steps.delete(self._directory, later)
                missing = step > 0 and step % self.every == 0 and step not in saved
        if cluster.any_of(missing):  # its save had failed
            self.save(step, state)

    def save(self, step, state):
        """Starts a save, if it has not been done; waits for it if the step is the last."""
        if step == self._newest:
            return
        self._newest = step
        save = self._keeper.save_now if step == self._last else self._keeper.save
        save(step, {"averages": state.averages}, self._meta)

    def complete(self, step, state):
        """Called before a checkpoint is saved, so that it has all snapshots up to its step."""
        if step % self.every == 0 or step == self._last:
            self.save(step, state)
        self._keeper.wait()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._keeper.close()


def write(run, widths, out, step=None):
    """Writes a checkpoint OUT/WIDTH/STEP for each width; returns [(its path, expected error)].

    run: a run with snapshots. step: of one of them; None: the last. A checkpoint that an earlier
    call wrote from the same snapshots stays. Sums are in float64. UserError if a width cannot be
    reconstructed.
    """
    found = snapshots.find(run, store.read_meta)
    step = found.steps[-1] if step is None else step
    given = [found.reconstruct(step, width) for width in widths]
    about = store.read_meta(found.directory, step)
    metas = [_meta(about, found, step, width) for width in widths]
    paths = [path_of(out, width) for width in widths]
    missing = [i for i, path in enumerate(paths) if _origin(path, step) != metas[i]["average"]]
    if missing:
        trees = _combine(found, [given[i][0] for i in missing], about["digests"]["averages"])
        with store.open_writer(background=False, alone=jax.process_count() > 1) as writer:
            for i, tree in zip(missing, trees, strict=True):
                store.save(writer, paths[i], step, {"ema": tree}, metas[i])
    return [(path, error) for path, (_, error) in zip(paths, given, strict=True)]


def path_of(out, width):
    """Where `write` puts the checkpoint of a width."""
    return disk.path(out) / f"{width:g}"


def _meta(about, found, step, width):
    """The meta of a checkpoint, with what its average was made from."""
    average = {
        "width": width,
        "tracked": list(found.widths),
        "snapshots": [each for each in found.steps if each <= step],
        "sha256": store.digest(about, "averages"),
    }
    return {name: about[name] for name in OF_RUN if name in about} | {"average": average}


def _origin(path, step):
    """The "average" in the meta of a checkpoint, None if there is none or it is damaged."""
    if not steps.is_complete(path / str(step)):
        return None
    try:
        return store.read_meta(path, step).get("average")
    except store.Damaged:
        return None


def _combine(found, given, digests):
    """A tree of parameters for each {(step, index): coefficient} of `given`."""
    needed = sorted({step for each in given for (step, _), factor in each.items() if factor})
    read = {step: store.open_leaves(found.directory, step, "averages") for step in needed}
    trees = [{} for _ in given]
    for leaf in (leaf for leaf in digests if leaf.startswith("[0]")):
        name = leaf.removeprefix("[0]")
        sums = [0.0] * len(given)
        for step in needed:
            for index in range(len(found.widths)):
                x = read[step](f"[{index}]{name}").astype(np.float64)
                sums = [old + each[step, index] * x for old, each in zip(sums, given, strict=True)]
        for tree, total in zip(trees, sums, strict=True):
            if not np.isfinite(total).all():
                raise UserError(
                    f"step must be of a snapshot before the run diverged, got {needed[-1]}: {name} "
                    "is not finite"
                )
            tree[tuple(re.findall(r"\['(\w+)'\]", name))] = total.astype(np.float32)
    logging.info("read the snapshots of %d steps", len(needed))
    return [traverse_util.unflatten_dict(tree) for tree in trees]
