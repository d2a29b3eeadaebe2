"""Checks and locks a run's directory.

It holds config.json, metrics.jsonl, history.jsonl, report.html, loss.png, samples/STEP.png and
checkpoints/STEP/; and init_from.json, if the run did not start from random parameters.
"""

import contextlib
import json
import os

import jax

from dit_jax import settings as settings_lib
from dit_jax.checkpoint import steps
from dit_jax.errors import UserError
from dit_jax.machine import cluster, disk
from dit_jax.runs import own_config, record

ORIGIN = "init_from.json"
LOGS = (".log", ".out", ".err")  # of Slurm, nohup and tee


def check(workdir, settings):
    """UserError if a run of these Settings can neither start nor resume here; writes nothing."""
    _check_path(workdir)
    if disk.exists(workdir / "config.json"):
        check_same(workdir, own_config.read_settings(workdir), settings)
        _check_saved(workdir)
    elif disk.exists(workdir / "metrics.jsonl"):
        raise UserError(
            f"workdir must not have lost its config.json, got {workdir}: restore it or use another"
        )
    elif foreign := [path.name for path in disk.children(workdir) if not _is_nothing(path.name)]:
        raise UserError(
            f"workdir must be new, empty or a run of dit-train, got {workdir} with {foreign[0]}"
        )


@contextlib.contextmanager
def held(workdir):
    """A context in which no other run writes to workdir; UserError if one does already.

    A bucket cannot be locked; there the record of the run detects another writer at a log.
    """
    with contextlib.ExitStack() as stack:
        with cluster.together():
            _make(workdir)
            if jax.process_index() == 0 and disk.is_on_disk(workdir):
                stack.enter_context(disk.locked(workdir, "workdir"))
        yield


def claim(workdir, settings, origin=None):
    """Writes config.json to a workdir that is held, and removes partial files of a killed run.

    origin: JSON, what the run started from; None if it started from random parameters.
    """
    for path in workdir.glob(".partial-*"):
        path.unlink()
    if origin:  # before config.json, so that no run has lost it
        disk.write_text(workdir / ORIGIN, json.dumps(origin, indent=2) + "\n")
    elif disk.exists(workdir / ORIGIN):  # of a run that was killed before it wrote its config.json
        (workdir / ORIGIN).unlink()
    text = json.dumps(settings_lib.to_json(settings), indent=2)
    disk.write_text(workdir / "config.json", text + "\n")


def _check_path(workdir):
    if not disk.is_on_disk(workdir):
        if not disk.exists(disk.bucket_of(workdir)):
            raise UserError(f"workdir must be in a bucket that exists, got {workdir}")
        return
    nearest = next(path for path in (workdir, *workdir.parents) if path.exists())
    if not nearest.is_dir():
        raise UserError(f"workdir must not be or lie under a file, got {workdir}")
    if not os.access(nearest, os.W_OK):
        raise UserError(f"workdir must be where you may write, got {workdir}")


def _make(workdir):
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"workdir must be where a folder can be made, got {workdir}: {error.strerror}"
        ) from error


def _is_nothing(name):
    """Whether a file of this name may be in the workdir of a new run.

    It is of a run that was killed at its start, of the system, or a log of the run to come.
    """
    return name == ORIGIN or disk.is_clutter(name) or name.endswith(LOGS)


def check_same(workdir, old, new):
    """UserError if two Settings of a run differ in what may not change."""
    found = settings_lib.differences(old, new)
    if found:
        name, before, after = found[0]
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        free = [name if "." in name else f"{name}.*" for name in settings_lib.FREE]
        raise UserError(
            f"workdir must not hold a run of another config: {workdir} has "
            f"{name} {before!r}, got {after!r}{more}; only {', '.join(free)} may change when a run "
            f"is resumed, and {' and '.join(settings_lib.MOVABLE)} if they hold the same: use "
            f"another --workdir, and to start from what this run has learned, --init_from={workdir}"
        )


def _check_saved(workdir):
    """UserError if the saved steps are gone: starting at 0 would drop the record.

    A run that was killed before its first save was complete may start at 0. On a disk a step's
    folder is renamed to its number after everything is in it.
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
            "there is no complete step in checkpoints; restore one or use another workdir"
        )
