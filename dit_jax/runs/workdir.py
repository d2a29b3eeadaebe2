"""The directory of a training run: whether a config may use it, and how it becomes the config's.

In it: config.json, metrics.jsonl, loss.png, samples/STEP.png, checkpoints/STEP/.
"""

import contextlib
import json
import os

import jax

from dit_jax.checkpoint import steps
from dit_jax.errors import UserError
from dit_jax.machine import cluster, disk
from dit_jax.runs import record

FREE = ("run", "mesh")  # topics of a config that may change when a run goes on


def check(workdir, config):
    """UserError where no run of this config can start or go on in the workdir; writes nothing."""
    _check_place(workdir)
    if disk.exists(workdir / "config.json"):
        old = _read_config(workdir / "config.json")
        check_same(workdir, old, config)
        _check_saved(workdir)
    elif disk.exists(workdir / "metrics.jsonl"):
        raise UserError(
            f"workdir must not have lost its config.json, got {workdir}: restore it or use another"
        )
    elif any(not _is_left_over(path) for path in disk.children(workdir)):
        raise UserError(f"workdir must be new, empty or a run of dit-train, got {workdir}")


@contextlib.contextmanager
def held(workdir):
    """A context in which no other run writes to the workdir; UserError where one does.

    In a bucket, where nothing can be locked, the record of the run finds that out, and later.
    """
    with contextlib.ExitStack() as stack:
        with cluster.together():
            workdir.mkdir(parents=True, exist_ok=True)
            if jax.process_index() == 0 and disk.is_on_disk(workdir):
                stack.enter_context(disk.locked(workdir, "workdir"))
        yield


def claim(workdir, config):
    """Makes a workdir that is held this config's own."""
    for path in workdir.glob(".partial-*"):
        path.unlink()  # of a run that was killed
    disk.write_text(workdir / "config.json", json.dumps(config, indent=2) + "\n")


def _check_place(workdir):
    if not disk.is_on_disk(workdir):
        if not disk.exists(disk.bucket_of(workdir)):
            raise UserError(f"workdir must be in a bucket that exists, got {workdir}")
        return
    nearest = next(place for place in (workdir, *workdir.parents) if place.exists())
    if not nearest.is_dir():
        raise UserError(f"workdir must not be or lie under a file, got {workdir}")
    if not os.access(nearest, os.W_OK):
        raise UserError(f"workdir must be where you may write, got {workdir}")


def _is_left_over(path):
    """Whether a run that was killed as it began left a file."""
    return path.name == ".lock" or path.name.startswith(".partial-")


def _read_config(path):
    try:
        config = json.loads(path.read_bytes())
        config["run"]["total_steps"]
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{path} must be the config of a run, but it is damaged: restore it or use another "
            f"workdir ({error!r})"
        ) from error
    return config


def check_same(workdir, old, new):
    """UserError where two configs of a run differ in what may not change."""
    differences = sorted(_differences(old, new))
    if differences:
        name, before, after = differences[0]
        more = f" (and {len(differences) - 1} more)" if len(differences) > 1 else ""
        raise UserError(
            f"workdir must not hold a run of another config: {workdir} has "
            f"{name} {before!r}, got {after!r}{more}"
        )


def _differences(old, new):
    """(name, old value, new value) of the fields that differ and may not."""
    names = {(topic, None) for topic in old.keys() | new.keys() if topic not in FREE}
    for topic, _ in list(names):
        if isinstance(old.get(topic), dict) and isinstance(new.get(topic), dict):
            names.remove((topic, None))
            names |= {(topic, name) for name in old[topic].keys() | new[topic].keys()}
    for topic, name in names:
        a, b = (c.get(topic) if name is None else c[topic].get(name) for c in (old, new))
        if a != b:
            yield ".".join(filter(None, (topic, name))), a, b


def _check_saved(workdir):
    """UserError where steps were saved and are gone: starting at 0 would drop the record.

    A run that was killed before its first save was whole starts at 0 by itself. On a disk
    a step's folder gets its number, in one move, when all is in it.
    """
    directory = workdir / "checkpoints"
    saved = [line.get("saved") for line in record.read(workdir / "metrics.jsonl")]
    named = disk.is_on_disk(directory) and any(
        path.name.isdecimal() for path in disk.children(directory)
    )
    if (any(saved) or named) and steps.latest(directory) is None:
        last = max((step for step in saved if step), default="?")
        raise UserError(
            f"workdir must not have lost its saved steps: {workdir} had saved step {last}, but "
            "there is no whole step in checkpoints; restore one or use another workdir"
        )
