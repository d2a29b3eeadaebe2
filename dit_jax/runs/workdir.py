"""Checks and claims a run's directory; imports no jax. `runs.lock` locks it.

It holds config.json, metrics.jsonl, history.jsonl, report.html, loss.png, samples/STEP.png and
checkpoints/STEP/; and init_from.json, if the run did not start from random parameters.
"""

import json
import os

from dit_jax import settings as settings_lib
from dit_jax.checkpoint import steps
from dit_jax.errors import UserError
from dit_jax.machine import disk
from dit_jax.runs import own_config, record

ORIGIN = "init_from.json"
LOGS = (".log", ".out", ".err")  # of Slurm, nohup and tee


def check(workdir, settings):
    """UserError if a run of these Settings can neither start nor resume here; writes nothing."""
    _check_path(workdir)
    if disk.exists(workdir / "config.json"):
        old = own_config.read_settings(workdir)
        if has_saved(workdir):
            check_same(workdir, old, settings)
            _check_saved(workdir)
    elif disk.exists(workdir / "metrics.jsonl"):
        raise UserError(
            f"workdir must not have lost its config.json, got {workdir}: restore it or use another"
        )
    elif foreign := [path.name for path in disk.children(workdir) if not _is_nothing(path.name)]:
        raise UserError(
            f"workdir must be new, empty or a run of dit-train, got {workdir} with {foreign[0]}"
        )


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


def has_saved(workdir):
    """Whether the run in workdir, if any, has saved a step, even if that is lost by now.

    A run that was killed before its first save was complete starts at 0, with any config: nothing
    of it is lost. On a disk a step's folder is renamed to its number after everything is in it.
    """
    directory = workdir / "checkpoints"
    named = disk.is_on_disk(directory) and any(
        path.name.isdecimal() for path in disk.children(directory)
    )
    return named or steps.latest(directory) is not None or any(_recorded(workdir))


def _recorded(workdir):
    """The saved steps that the record of the run names."""
    lines = record.read(workdir / "metrics.jsonl")
    return [line["saved"] for line in lines if line.get("saved")]


def _check_saved(workdir):
    """UserError if the saved steps are gone: starting at 0 would drop the record."""
    recorded = _recorded(workdir)
    if steps.latest(workdir / "checkpoints") is None:
        last = max(recorded, default="?")
        raise UserError(
            f"workdir must not have lost its saved steps: {workdir} had saved step {last}, but "
            "there is no complete step in checkpoints; restore one or use another workdir"
        )
