"""Files and folders on a disk or in a bucket of Google Cloud Storage (gs://BUCKET/NAME).

Files are written atomically, and a folder is locked for one run at a time. A bucket has objects and
no folders. An object is written atomically; it cannot be renamed, appended to or locked.
"""

import contextlib
import fcntl
import functools
import hashlib
import importlib.util
import json
import os
import re
import tempfile
import time
from pathlib import Path

from absl import logging

from dit_jax import compat
from dit_jax.errors import UserError

BUCKETS = "gs://"
CLUTTER = {  # folders and files that systems and file managers make
    *("__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information"),
    *("lost+found", "Thumbs.db", "desktop.ini"),
}
compat.keep_etils_off_tensorflow()


def path(text):
    """The Path of a text that may start with ~, or an epath.Path if it names a bucket.

    It also accepts a path, which it returns unchanged. It logs the first path in each bucket, since
    a bucket that does not answer takes long. UserError for another scheme or without gcsfs.
    """
    text = os.fspath(text)
    if not re.match("(?i)[a-z0-9+.-]+:/", text):  # with one slash it is meant to be a bucket too
        return Path(os.path.expanduser(text))
    if not re.match(f"{BUCKETS}[^/]", text):
        raise UserError(f"a path must be on a disk or start with gs://BUCKET, got {text}")
    if importlib.util.find_spec("gcsfs") is None:
        raise UserError(f"a path in a bucket needs gcsfs: pip install -e .[gcs], got {text}")
    _announce(text.removeprefix(BUCKETS).split("/")[0])
    from etils import epath  # here, since only buckets need it

    compat.list_buckets_afresh()
    return epath.Path(text)


@functools.cache
def _announce(bucket):
    logging.info("opening the bucket %s%s", BUCKETS, bucket)


def is_on_disk(path):
    return isinstance(path, Path)


def absolute(text):
    """Like `path`, but absolute if it is on a disk."""
    result = path(text)
    return result.resolve() if is_on_disk(result) else result


def bucket_of(file):
    """The path of the bucket that contains a path."""
    return path(BUCKETS + str(file).removeprefix(BUCKETS).split("/")[0])


def is_of_bucket(error):
    """Whether the client of the buckets raised an exception; its text may name no path."""
    return type(error).__module__.startswith(("gcsfs.", "google.", "aiohttp."))


def is_refusal(error):
    """Whether an exception means that a bucket refused access or did not answer."""
    return (
        is_of_bucket(error)
        or str(error).startswith(compat.TENSORSTORE_REFUSALS)
        or (isinstance(error, OSError) and not isinstance(error, FileNotFoundError))
    )


def is_clutter(name):
    """Whether a file is hidden (.DS_Store, .nfs0001), or made by the system (lost+found)."""
    return name.startswith(".") or name in CLUTTER


@contextlib.contextmanager
def only_warned(complaint):
    """A context that logs an OSError or a refusal of a bucket as a warning and goes on."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, OSError) and not is_refusal(error):
            raise
        logging.warning("%s: %s", complaint, error)


def exists(path):
    """Whether a file or folder exists; raises if a bucket does not answer.

    A bucket path's own exists() and is_dir() return False then, and a run would start from scratch.
    """
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def make_folder(folder, name):
    """Makes a folder with its parents; UserError that names the argument if it cannot be made."""
    try:
        path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{name} must be where a folder can be made, got {folder}: {error.strerror or error}"
        ) from error


def user_cache():
    """The folder dit_jax in $XDG_CACHE_HOME or ~/.cache, for what can be made again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "dit_jax"


def check_writable(path, name):
    """UserError that names the argument unless a path on a disk can be made or written into.

    Tries it in the nearest folder that exists, and leaves nothing there: the permissions say too
    little for root, or on a read-only disk.
    """
    try:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            _partial(path).stat()  # the longest name of all, which may be too long
        nearest = next(each for each in (path, *path.absolute().parents) if each.is_dir())
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise UserError(
            f"{name} must be where you may write, got {path}: {error.strerror}"
        ) from error


def children(folder):
    """The paths in a folder, [] if it does not exist; raises if a bucket does not answer."""
    try:
        paths = sorted(set(folder.iterdir()))
    except (FileNotFoundError, NotADirectoryError):
        return []
    # Google's web console creates a folder as an empty object, which is listed as its own child.
    return [path for path in paths if path.name != folder.name or exists(path)]


def move(source, target):
    """Moves a folder to a path that does not exist yet; in a bucket it copies, then deletes."""
    if is_on_disk(source):
        source.rename(target)
        return
    import fsspec  # here, since only buckets need it

    fsspec.filesystem("gcs").copy(str(source), str(target), recursive=True)
    source.rmtree()


def write_text(file, text):
    """Writes a file of text in UTF-8 atomically."""
    write_bytes(file, text.encode())


def write_bytes(file, data):
    """Writes a file atomically; a full disk leaves the file as it was."""
    if not is_on_disk(path(file)):
        path(file).write_bytes(data)
        return
    with replacing(file) as opened:
        opened.write(data)


@contextlib.contextmanager
def replacing(file):
    """A context that opens a new binary file, which becomes `file` at the end if nothing fails."""
    file = path(file)
    partial = _partial(file)
    try:
        with partial.open("wb") as opened:
            yield opened
        partial.replace(file)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _partial(file):
    return file.parent / f".partial-{os.getpid()}-{file.name}"


def append(path, lines, *, after):
    """Appends lines atomically to a file whose text is `after`; returns its new text.

    In a bucket it rewrites the whole object. If another run has written to it, this is a UserError
    that names the workdir.
    """
    if is_on_disk(path):
        _append(path, lines.encode())
    elif path.read_text() != after:
        raise UserError(f"workdir must not be written by another run, got {path.parent}")
    else:
        path.write_text(after + lines)
    return after + lines


def _append(path, data):
    with path.open("ab", buffering=0) as file:
        end = file.tell()
        try:
            if file.write(data) != len(data):
                raise OSError(f"{path} cannot be written: the disk has room for a part only")
        except OSError:
            file.truncate(end)
            raise


def read_json(file):
    """The JSON object in a file, {} if the file does not exist; UserError if it is corrupt."""
    file = path(file)
    if not exists(file):
        return {}
    try:
        content = json.loads(file.read_bytes())
    except ValueError as error:
        raise UserError(f"{file} must be JSON, but it is damaged: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} must be a JSON object, got {type(content).__name__}")
    return content


def size(path):
    """The bytes of a file, None if it does not exist; raises if a bucket does not answer."""
    if is_on_disk(path):
        return path.stat().st_size if path.is_file() else None
    try:
        return path.stat().length
    except FileNotFoundError:
        return None


def read_range(path, start, end):
    """The bytes start .. end - 1 of an object in a bucket."""
    import fsspec  # here, since only buckets need it

    return fsspec.filesystem("gcs").cat_file(str(path), start=start, end=end)


def sha256(file):
    with path(file).open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


@contextlib.contextmanager
def turn(folder, on_wait):
    """A context that one process at a time enters; calls on_wait() every second until then.

    A killed process leaves it at once. OSError if the disk cannot lock.
    """
    with (Path(folder) / ".lock").open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                on_wait()
                time.sleep(1)
        yield


def is_locked(folder):
    """Whether a run holds the lock of a folder on a disk; False if the disk cannot lock.

    It asks by locking for a moment, shared: nothing else tells who holds a lock.
    """
    try:
        with (Path(folder) / ".lock").open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


def total_size(folder):
    """The bytes of all files in a folder."""
    if not is_on_disk(folder):
        import fsspec  # here, since only buckets need it

        return fsspec.filesystem("gcs").du(str(folder))
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # a running training deletes steps
                total += os.lstat(os.path.join(root, name)).st_size
    return total


@contextlib.contextmanager
def locked(folder, name):
    """A context that locks a folder on a disk; UserError if another run holds the lock.

    name: of the argument, for the message. A network share that cannot lock gives a warning only.
    """
    path = Path(folder) / ".lock"
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(file.fileno()).st_nlink == 0:  # another run has just released it
                raise BlockingIOError
        except BlockingIOError as error:
            raise UserError(f"{name} must not be written by another run, got {folder}") from error
        except OSError as error:
            logging.warning("%s cannot be locked, let no other run write to it: %s", folder, error)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
