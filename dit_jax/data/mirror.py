"""Copies a data set from a bucket to a disk of this host, checked by sha256.

All processes of a host share a copy: CACHE/NAME-DIGEST/, where DIGEST is of the content. A shard is
written to .partial-SHARD, compared with the manifest's sha256 and renamed. manifest.json is written
last: without it a copy is unfinished, and every shard in it is compared again. An interrupted call
goes on where it was.
"""

import concurrent.futures
import contextlib
import json
import os
import shutil
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from absl import logging

from dit_jax.data import arrayrecord, latents, prepare
from dit_jax.errors import UserError
from dit_jax.machine import disk

THREADS = 8  # shards copied at once: one stream does not fill a network
BLOCK = 2**25  # bytes of a request
LOG_SECONDS = 10


class Content(NamedTuple):
    """What a run needs of a data set in a bucket."""

    path: object  # in the bucket
    manifest: dict  # of a copy
    shards: dict  # {name: entry}, see `arrayrecord`

    @property
    def num_bytes(self):
        return sum(entry["file_bytes"] for entry in self.shards.values())

    @property
    def sha256(self):
        if "splits" in self.manifest:
            return arrayrecord.content_sha256(self.shards)
        return latents.content_sha256(self.manifest)

    def bytes_in(self, folder):
        """How many bytes of the shards a folder holds, parts of shards included."""
        paths = [path for name in self.shards for path in (folder / name, _partial(folder / name))]
        return sum(disk.size(path) or 0 for path in paths)


class Watched(NamedTuple):
    """A source that reads a copy. If a shard is corrupt, the next call of `local` repairs it."""

    source: Sequence
    folder: Path

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        try:
            return self.source[index]
        except UserError as error:
            (self.folder / "manifest.json").unlink(missing_ok=True)
            raise UserError(
                f"{error}; this is a copy, which the same command compares and repairs"
            ) from error


def local(path, split, cache="", check=None):
    """The folder of a data set: `path` itself on a disk, or a whole copy if it is in a bucket.

    split: which one of dit-prepare's is needed. cache: the folder of the copies; "": dit_jax in
    $XDG_CACHE_HOME or ~/.cache. check(manifest) is called before anything is copied. UserError or
    OSError if it cannot be copied; what was copied stays.
    """
    source = disk.path(path)
    if disk.is_on_disk(source):
        return source
    content = _find(source, split)
    if check:
        check(content.manifest)
    folder = _cache_folder(cache) / f"{source.name}-{content.sha256[:12]}"
    if not _is_finished(folder, content):
        _copy(content, folder)
    logging.info("reading %s from its copy %s", source, folder)
    return folder


def _cache_folder(cache):
    if cache:
        folder = disk.path(cache)
        if not disk.is_on_disk(folder):
            raise UserError(f"data.cache must be on a disk, got {cache}")
        return folder
    return disk.user_cache()


def _find(source, split):
    """The Content of a path in a bucket."""
    with _explained(source):
        manifest = disk.read_json(source / "manifest.json")
    kind = "an output of dit-prepare or dit-encode, whose manifest.json has digests"
    try:
        if "splits" in manifest:
            if split not in manifest["splits"]:
                names = ", ".join(manifest["splits"])
                raise UserError(f"data.split must be one of {names} in {source}, got {split!r}")
            part = manifest["splits"][split]
            content = Content(source, manifest | {"splits": {split: part}}, part["shards"])
        else:
            content = Content(source, manifest, manifest["shards"])
        _ = content.sha256, content.num_bytes
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"data.path must be {kind}, got {source}: mount other buckets") from None
    if any(Path(name).name != name for name in content.shards):
        raise UserError(f"data.path must be {kind}, got {source} with shards elsewhere")
    return content


def _is_finished(folder, content):
    try:
        if disk.read_json(folder / "manifest.json") != content.manifest:
            return False
    except UserError:  # it is damaged
        return False
    return all(arrayrecord.is_whole(folder / name, x) for name, x in content.shards.items())


def _copy(content, folder):
    """Completes the copy in a folder, once no other process does."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        progress = _Progress(content, folder)
        with disk.turn(folder, progress.wait):
            if _is_finished(folder, content):
                return
            (folder / "manifest.json").unlink(missing_ok=True)
            _check_room(content, folder)
            _fetch_all(content, folder, progress)
            _finish(content, folder)
    except OSError as error:
        raise OSError(
            f"{content.path} could not be copied to {folder}: {error}; what was copied is kept, "
            "data.cache can name another folder"
        ) from error


def _finish(content, folder):
    """Writes what else a data set's folder has, from the manifest, and the manifest."""
    if "splits" in content.manifest:
        prepare.finish(folder, content.manifest)
    else:
        disk.write_text(folder / "manifest.json", json.dumps(content.manifest, indent=1) + "\n")


def _check_room(content, folder):
    """UserError if the disk has no room for the rest of a copy."""
    missing = content.num_bytes - content.bytes_in(folder)
    free = shutil.disk_usage(folder).free
    if missing > free:
        raise UserError(
            f"data.cache must have {missing / 1e9:.3g} GB free for the rest of {content.path}, got "
            f"{free / 1e9:.3g} GB in {folder.parent}: name a folder on another disk, or mount the "
            "bucket"
        )


def _fetch_all(content, folder, progress):
    """Copies all shards in threads; stops all of them when one fails."""
    progress.start()
    stop = threading.Event()
    pool = concurrent.futures.ThreadPoolExecutor(THREADS)
    try:
        running = {
            pool.submit(_fetch, content.path / name, folder / name, entry, stop)
            for name, entry in content.shards.items()
        }
        while running:
            done, running = concurrent.futures.wait(
                running, timeout=1, return_when=concurrent.futures.FIRST_COMPLETED
            )
            for future in done:
                future.result()
            progress.log()
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)
    progress.end()


def _fetch(source, path, entry, stop):
    """Copies one shard, unless it is there; UserError if the bucket has other bytes."""
    if arrayrecord.is_whole(path, entry) and disk.sha256(path) == entry["sha256"]:
        return
    path.unlink(missing_ok=True)
    partial = _partial(path)
    attempts = 2 if partial.exists() else 1  # a crash may have left other bytes in it
    for _ in range(attempts):
        _append(source, partial, entry["file_bytes"], stop)
        if stop.is_set():
            return
        if disk.sha256(partial) == entry["sha256"]:
            partial.rename(path)
            return
        partial.unlink()
    raise UserError(
        f"{source} is damaged: its sha256 is not {entry['sha256']}: copy it to the bucket again"
    )


def _append(source, partial, size, stop):
    """Copies the rest of `size` bytes of an object to a file that may have the first of them."""
    with _explained(source):
        arrayrecord.check_files(source.parent, {source.name: {"file_bytes": size}})
    with partial.open("ab") as file:
        if file.tell() > size:
            file.truncate(0)
        while (start := file.seek(0, os.SEEK_END)) < size and not stop.is_set():
            with _explained(source):
                data = disk.read_range(source, start, min(start + BLOCK, size))
                if not data:
                    raise OSError(f"it ended at byte {start} of {size}")
            file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _partial(path):
    return path.with_name(f".partial-{path.name}")


@contextlib.contextmanager
def _explained(source):
    """A context in which a refusal of a bucket becomes a UserError of one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not disk.is_refusal(error):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"data.path must be readable, got {source}: {reason}") from error


class _Progress:
    """Logs how much of a copy is there, how fast it grows and how long the rest takes."""

    def __init__(self, content, folder):
        self._content, self._folder, self._waits = content, folder, False
        self._reset()

    def _reset(self):
        self._before = self._content.bytes_in(self._folder)
        self._started = self._logged = time.monotonic()

    def wait(self):
        if not self._waits:
            self._waits = True
            logging.info("another process copies %s to %s", self._content.path, self._folder)
        self.log()

    def start(self):
        self._reset()
        logging.info(
            "copying %s to %s: %d shards, %.3g GB, of which %.3g GB are there",
            *(self._content.path, self._folder, len(self._content.shards)),
            *(self._content.num_bytes / 1e9, self._before / 1e9),
        )

    def log(self):
        now = time.monotonic()
        if now - self._logged < LOG_SECONDS:
            return
        self._logged, present = now, self._content.bytes_in(self._folder)
        rate = (present - self._before) / (now - self._started)
        left = f"{(self._content.num_bytes - present) / rate:.0f} s left" if rate > 0 else "waiting"
        numbers = (present / 1e9, self._content.num_bytes / 1e9, rate / 1e6, left)
        logging.info("copied %.3g of %.3g GB, %.3g MB/s, %s", *numbers)

    def end(self):
        seconds = time.monotonic() - self._started
        copied = self._content.bytes_in(self._folder) - self._before
        logging.info(
            "copied %.3g GB in %.0f s, %.3g MB/s, to %s",
            *(copied / 1e9, seconds, copied / 1e6 / max(seconds, 1e-3), self._folder),
        )
