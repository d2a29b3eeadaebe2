"""Reads everything that was saved in a directory and reports damage.

    dit-verify runs/xl2

DIR is a training run, its checkpoints, one step, a converted checkpoint, or the output of
dit-prepare or dit-encode. The command compares every array with its digest, every shard with its
sha256, and config.json with the newest step; it reads metrics.jsonl and names what is missing. It
writes nothing. Exit code 0: no damage; 1: something is damaged, and named.
"""

import sys

from dit_jax import settings as settings_lib
from dit_jax.checkpoint import steps, store
from dit_jax.cli import command
from dit_jax.data import arrayrecord
from dit_jax.errors import UserError
from dit_jax.machine import disk
from dit_jax.runs import record
from dit_jax.runs import workdir as workdirs

RUN = ("config.json", "metrics.jsonl", "checkpoints")  # each of them marks a run


def main(values, path):
    path = disk.path(path)
    if not disk.exists(path):
        raise UserError(f"DIR must exist, got {path}")
    parts = list(find(path))
    if not parts:
        raise UserError(
            "DIR must hold saved steps, or the output of dit-prepare or dit-encode: "
            f"there is none in {path}"
        )
    damaged = 0
    for name, check in parts:
        try:
            print(f"{name:40s} {check()}", flush=True)
        except (ValueError, OSError) as error:
            damaged += 1
            print(f"{name:40s} DAMAGED: {error}", flush=True)
    print(f"{damaged} of {len(parts)} are damaged" if damaged else "no damage found")
    return 1 if damaged else 0


def define(values):
    """Defines no flags."""


def find(path):
    """(name, check) of everything in a directory; check() describes it or raises."""
    if disk.exists(path / "manifest.json"):
        yield from find_shards(path)
        return
    if any(disk.exists(path / name) for name in RUN):
        yield "config.json", lambda: describe_config(path)
        yield "metrics.jsonl", lambda: describe_record(path)
    yield from find_steps(path)
    for aside in sorted(disk.children(path / "damaged")):
        yield f"damaged/{aside.name}", lambda: "was set aside as corrupt; it is not used"


def find_steps(path):
    if steps.is_complete(path):
        directory, saved = path.parent, [int(path.name)]
    else:
        directory = path / "checkpoints" if disk.exists(path / "checkpoints") else path
        saved = steps.saved(directory)
        for step in steps.incomplete(directory):
            reason = f"{directory / str(step)} is incomplete"
            yield f"{directory.name}/{step}", lambda reason=reason: complain(reason)
    for step in saved:
        yield f"{directory.name}/{step}", lambda step=step: describe_step(directory, step)


def complain(reason):
    raise UserError(reason)


def describe_step(directory, step):
    try:
        store.verify(directory, step)
    except store.Damaged:
        if steps.is_complete(directory / str(step)):
            raise
        return "was deleted meanwhile by a running training"
    meta = store.read_meta(directory, step)
    count = sum(len(leaves) for leaves in meta["digests"].values())
    words = f"{count} arrays of {', '.join(meta['digests'])}"
    return f"{words}; loss {meta['loss']:.4f}" if "loss" in meta else words


def describe_config(path):
    """Checks that config.json exists and agrees with the newest step."""
    fields = disk.read_json(path / "config.json")
    if not fields:
        raise UserError(f"{path / 'config.json'} is missing or empty")
    settings = settings_lib.read(fields)
    step = steps.latest(path / "checkpoints")
    try:
        if step is not None:
            saved = store.read_meta(path / "checkpoints", step)["config"]
            workdirs.check_same(path, settings_lib.read(saved), settings)
    except store.Damaged:
        pass  # reported with the step
    return f"seed {settings.seed}, to step {settings.run.total_steps}"


def describe_record(path):
    """Checks that metrics.jsonl can be read and that the last step it names as saved exists."""
    records = record.read(path / "metrics.jsonl")
    newest = steps.latest(path / "checkpoints")
    if not records:
        if newest is not None:
            raise UserError(f"{path / 'metrics.jsonl'} is missing or empty")
        return "no record yet"
    saved = records[-1].get("saved")
    if saved and (newest is None or newest < saved):
        raise UserError(f"step {saved} was saved but is missing")
    return f"{len(records)} records to step {records[-1]['step']}"


def find_shards(path):
    """The shards of every split or of a cache; none if another program wrote manifest.json."""
    try:
        manifest = disk.read_json(path / "manifest.json")
    except ValueError as error:
        yield "manifest.json", lambda error=error: complain(error)
        return
    for group in manifest.get("splits", {"": manifest}).values():
        for name, shard in group.get("shards", {}).items():
            yield name, lambda name=name, shard=shard: describe_shard(path / name, shard)


def describe_shard(path, shard):
    arrayrecord.check_digest(path, shard)
    return f"{shard['file_bytes'] / 1e6:.1f} MB"


def entry():
    sys.exit(command.run("dit-verify", define, main, takes=("DIR",)))


if __name__ == "__main__":
    entry()
