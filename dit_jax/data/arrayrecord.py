"""Shards: ArrayRecord files that are written atomically, and checked by size and sha256.

A command writes each shard to a `.partial-*` file and renames it. Its manifest keeps an entry for
each shard: {"file_bytes": size in bytes, "sha256": hex digest, ...}.
"""

import contextlib
import hashlib
import json
import os
import shutil

from array_record.python import array_record_module

from dit_jax.errors import UserError
from dit_jax.machine import disk

PROGRESS = ".progress"  # folder with a JSON entry for each finished shard, until all are finished


@contextlib.contextmanager
def open_writer(path):
    """Yields an ArrayRecord writer; OSError if a write fails, for example on a full disk."""
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1,uncompressed")
    try:
        yield writer
        writer.close()
    except RuntimeError as error:
        reason = str(error).partition(";")[0]
        raise OSError(f"{path} cannot be written: {reason}; finished shards are kept") from error


def partial_path(path):
    """The temporary path of this process for a shard."""
    return path.with_name(f".partial-{os.getpid()}-{path.name}")


def seal(partial, path):
    """Flushes a written file to the disk, renames it to `path` and returns its entry."""
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    entry = {"file_bytes": partial.stat().st_size, "sha256": disk.sha256(partial)}
    partial.rename(path)
    return entry


def content_sha256(entries, *more):
    """A hex digest of the contents of the shards {name: entry}, in order, and of JSON values."""
    shards = [[name, entry["sha256"]] for name, entry in entries.items()]
    return hashlib.sha256(json.dumps([shards, *more], sort_keys=True).encode()).hexdigest()


def is_whole(path, entry):
    """Whether a shard exists with the size of its entry. Its content is not read."""
    return disk.size(path) == entry["file_bytes"]


def check_files(folder, entries):
    """UserError if one of the shards {name: entry} is missing or has another size."""
    for name, entry in entries.items():
        path = folder / name
        if not is_whole(path, entry):
            size = disk.size(path)
            raise UserError(
                f"{path} must have {entry['file_bytes']} bytes, "
                f"got {'no file' if size is None else size}: "
                "repeat the command that wrote it, or copy it again"
            )


def check_digest(path, entry):
    """UserError if the size or the sha256 of a shard differs from its entry. Reads the file."""
    check_files(path.parent, {path.name: entry})
    if disk.sha256(path) != entry["sha256"]:
        raise UserError(f"{path} is damaged: its sha256 is not {entry['sha256']}")


def read_record(records, index, path):
    """Record `index` of a data source; UserError if its shard is corrupt. path: for the message."""
    try:
        return records[index]
    except RuntimeError as error:
        reason = str(error).partition(";")[0]
        raise UserError(
            f"example {index} of {path} cannot be read: its shard is damaged, copy it again: "
            f"{reason}"
        ) from error


def remove_partials(folder):
    """Deletes the temporary files that a killed command has left."""
    for path in [*folder.glob(".partial-*"), *(folder / PROGRESS).glob(".partial-*")]:
        path.unlink()


def remove_notes(folder):
    """Deletes the PROGRESS folder, once the manifest holds every entry."""
    if (folder / PROGRESS).exists():
        shutil.rmtree(folder / PROGRESS)
