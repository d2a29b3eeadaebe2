"""Files and folders: written whole or not at all, read or named, held by one run at a time."""

import contextlib
import fcntl
import hashlib
import json
import os
from pathlib import Path


def write_text(path, text):
    """Writes a whole file or none."""
    path = Path(path)
    aside = path.with_name(f".partial-{os.getpid()}-{path.name}")
    aside.write_text(text)
    aside.replace(path)


def read_json(path):
    """The JSON object in a file, {} where there is no file."""
    path = Path(path)
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} must be JSON, but it is damaged: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must be a JSON object, got {type(content).__name__}")
    return content


def sha256(path):
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def locked(folder, name):
    """Holds the folder; ValueError that names the argument where another run does."""
    path = Path(folder) / ".lock"
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(file.fileno()).st_nlink == 0:  # another run has just let go of it
                raise BlockingIOError
        except BlockingIOError as error:
            raise ValueError(f"{name} must not be written by another run, got {folder}") from error
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
