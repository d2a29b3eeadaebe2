"""The steps in a directory: list, locate, delete and set aside."""

import os
import shutil

from dit_jax.errors import UserError
from dit_jax.machine import disk

KINDS = {  # what a path must be to have a saved step
    "checkpoint": "a directory with a saved step",
    "vae": "a folder that `dit-convert vae` wrote",
    "inception": "a folder that `dit-convert inception` wrote",
    "init_from": "a run of dit-train or a checkpoint of dit-convert",
}
COMMIT = "commit_success.txt"  # in a bucket, the object of a step that Orbax writes last


def latest(directory):
    """The newest complete step in a directory; None if there is none."""
    return max(saved(directory), default=None)


def saved(directory):
    """The complete steps in a directory, ascending."""
    paths = disk.children(disk.path(directory))
    return sorted(int(path.name) for path in paths if is_complete(path))


def is_complete(path):
    """Whether a path is the folder of a step whose save was completed."""
    # On a disk Orbax renames the finished folder; in a bucket it writes COMMIT last.
    last = "_CHECKPOINT_METADATA" if disk.is_on_disk(path) else COMMIT
    return path.name.isdecimal() and disk.exists(path / last)


def incomplete(directory):
    """The steps in a directory on a disk, ascending, that have lost a file."""
    paths = [path for path in disk.children(disk.path(directory)) if disk.is_on_disk(path)]
    return sorted(int(p.name) for p in paths if p.name.isdecimal() and not is_complete(p))


def delete(directory, step):
    """Deletes a step. Atomic: it is unlisted before its files are removed."""
    path = disk.path(directory) / str(step)
    if disk.is_on_disk(path):
        path = path.rename(path.with_name(f".deleted-{step}"))
        shutil.rmtree(path, ignore_errors=True)
    else:
        (path / COMMIT).unlink()
        path.rmtree()


def clean(directory):
    """Deletes what interrupted saves and deletions left behind."""
    for path in disk.children(disk.path(directory)):
        if disk.is_on_disk(path):
            if path.name.startswith(".deleted-") or ".orbax-checkpoint-tmp" in path.name:
                shutil.rmtree(path, ignore_errors=True)
        elif path.name.isdecimal() and not is_complete(path):
            path.rmtree()


def set_aside(directory, step):
    """Moves a step to damaged/STEP beside the directory of the steps; returns its new path."""
    directory = disk.path(directory)
    damaged = directory.parent / "damaged"
    damaged.mkdir(exist_ok=True)
    target = damaged / str(step)
    while disk.exists(target):
        target = target.with_name(f"{target.name}-again")
    disk.move(directory / str(step), target)
    return target


def are_in(path):
    """Whether a path is a run or a checkpoint with a saved step, or the folder of a step."""
    path = disk.path(path)
    return is_complete(path) or bool(saved(path) or saved(path / "checkpoints"))


def locate(path, step=None, *, name="checkpoint"):
    """(directory of the steps, step) of a run, of its `checkpoints`, or of one step's folder.

    step: which of the saved ones; None: the newest, or the one whose folder `path` is. name: of the
    argument, in KINDS. UserError if it is not saved.
    """
    if not isinstance(path, (str, os.PathLike)) or not os.fspath(path):
        raise UserError(f"{name} must be {KINDS[name]}, got {path!r}")
    path = disk.path(path)
    if is_complete(path):
        directory, known = path.parent, [int(path.name)]
    else:
        inside = path / "checkpoints"
        directory = inside if disk.exists(inside) else path
        known = saved(directory)
    if not known:
        raise UserError(f"{name} must be {KINDS[name]}, got {path}")
    if step is not None and step not in known:
        raise UserError(f"step must be one of {', '.join(map(str, known))}, got {step!r}")
    return directory, known[-1] if step is None else int(step)
