"""Files and folders: written whole or not at all, read or named, held by one run at a time.

They lie on a disk, or in a bucket of Google Cloud Storage (gs://BUCKET/NAME), which has objects
and no folders: an object is written whole or not at all, and nothing can be renamed, added to or
locked.
"""

import contextlib
import fcntl
import hashlib
import importlib.util
import json
import os
import re
from pathlib import Path

from absl import logging

from dit_jax.errors import UserError

BUCKETS = "gs://"
# How TensorStore's exceptions begin where a bucket was refused to it or not reached.
REFUSALS = ("PERMISSION_DENIED", "UNAUTHENTICATED", "UNAVAILABLE", "DEADLINE_EXCEEDED")
# Where TensorFlow is installed, etils would reach buckets by it, with exceptions of its own.
os.environ.setdefault("EPATH_USE_TF", "no")


def path(text):
    """The path of a text, on a disk, where it may start with ~, or in a bucket: like a Path there.

    A path stays what it is.
    """
    text = os.fspath(text)
    if "://" not in text:
        return Path(os.path.expanduser(text))
    if not re.match(f"{BUCKETS}[^/]", text):
        raise UserError(f"a path must be on a disk or start with gs://BUCKET, got {text}")
    if importlib.util.find_spec("gcsfs") is None:
        raise UserError(f"a path in a bucket needs gcsfs: pip install -e .[gcs], got {text}")
    import fsspec  # here, since only buckets need it
    from etils import epath

    # What another process writes has to be seen, and gcsfs keeps its listings for ever.
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
    return epath.Path(text)


def is_on_disk(path):
    return isinstance(path, Path)


def absolute(text):
    """The path of a text, from the root of its disk or from its bucket."""
    place = path(text)
    return place.resolve() if is_on_disk(place) else place


def bucket_of(place):
    """The path of the bucket in which a path lies."""
    return path(BUCKETS + str(place).removeprefix(BUCKETS).split("/")[0])


def is_refusal(error):
    """Whether an exception of a bucket's clients says that it was refused or not reached."""
    return (
        type(error).__module__.startswith(("gcsfs.", "google.", "aiohttp."))
        or str(error).startswith(REFUSALS)
        or (isinstance(error, OSError) and not isinstance(error, FileNotFoundError))
    )


@contextlib.contextmanager
def only_warned(complaint):
    """A context in which a disk or a bucket that refuses is complained of, and no error."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, OSError) and not is_refusal(error):
            raise
        logging.warning("%s: %s", complaint, error)


def exists(place):
    """Whether there is such a file or folder; raises where a bucket does not answer.

    There a path's own exists() and is_dir() say no, and a run would begin anew.
    """
    try:
        place.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def children(folder):
    """The paths in a folder, [] where there is none; raises where a bucket does not answer."""
    try:
        paths = sorted(set(folder.iterdir()))
    except (FileNotFoundError, NotADirectoryError):
        return []
    # Google's console marks a folder that one makes there by an object, which lists as its child.
    return [path for path in paths if path.name != folder.name or exists(path)]


def move(source, target):
    """Moves a folder to a name that is free; in a bucket it is copied there, then deleted."""
    if is_on_disk(source):
        source.rename(target)
        return
    import fsspec

    fsspec.filesystem("gcs").copy(str(source), str(target), recursive=True)
    source.rmtree()


def write_text(place, text):
    """Writes a whole file or none."""
    place = path(place)
    if not is_on_disk(place):
        place.write_text(text)
        return
    aside = place.with_name(f".partial-{os.getpid()}-{place.name}")
    aside.write_text(text)
    aside.replace(place)


def append(place, lines, *, after):
    """Adds lines to a file whose text is `after`, all or none of them; returns its new text.

    In a bucket the whole object is written anew, and it is a UserError that names the workdir
    where another run has written to it.
    """
    if is_on_disk(place):
        _append(place, lines.encode())
    elif place.read_text() != after:
        raise UserError(f"workdir must not be written by another run, got {place.parent}")
    else:
        place.write_text(after + lines)
    return after + lines


def _append(place, data):
    with place.open("ab", buffering=0) as file:
        end = file.tell()
        try:
            if file.write(data) != len(data):
                raise OSError(f"{place} cannot be written: there is room for a part only")
        except OSError:
            file.truncate(end)
            raise


def read_json(place):
    """The JSON object in a file, {} where there is no file."""
    place = path(place)
    if not exists(place):
        return {}
    try:
        content = json.loads(place.read_bytes())
    except ValueError as error:
        raise UserError(f"{place} must be JSON, but it is damaged: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{place} must be a JSON object, got {type(content).__name__}")
    return content


def sha256(path):
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def locked(folder, name):
    """Holds a folder on a disk; UserError that names the argument where another run does.

    Some shares cannot lock: then it is only warned.
    """
    path = Path(folder) / ".lock"
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(file.fileno()).st_nlink == 0:  # another run has just let go of it
                raise BlockingIOError
        except BlockingIOError as error:
            raise UserError(f"{name} must not be written by another run, got {folder}") from error
        except OSError as error:
            logging.warning("%s cannot be locked, let no other run write to it: %s", folder, error)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
