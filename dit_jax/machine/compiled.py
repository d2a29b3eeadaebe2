"""Keeps compiled programs on disk, so that the next start of a command need not compile them."""

import os
import tempfile

import jax
from absl import logging

from dit_jax.machine import disk

VARIABLE = "JAX_COMPILATION_CACHE_DIR"
MAX_BYTES = 4 * 2**30


def keep():
    """Turns jax's persistent compilation cache on if that is safe here.

    Returns the folder that it chose; None if it changed nothing.

    It is in `disk.user_cache`, for a single process with a GPU or TPU. On CPUs jax 0.9 and 0.10
    print errors about the features of the processor, and may crash with programs of another one:
    https://github.com/jax-ml/jax/issues/38445. Of several processes only the first one writes, so
    a folder of each host would not help the others; and GPUs that choose kernels together would
    wait for a process that found its program on disk. A folder in JAX_COMPILATION_CACHE_DIR wins;
    JAX_ENABLE_COMPILATION_CACHE=false turns the cache off.

    Needs to be called before anything is compiled, and after `cluster.connect`.
    """
    chosen = VARIABLE in os.environ or jax.config.jax_compilation_cache_dir
    if chosen or not jax.config.jax_enable_compilation_cache:
        return None
    if jax.default_backend() == "cpu" or jax.process_count() > 1:
        return None
    try:
        folder = disk.user_cache() / "compiled"
        make_private(folder)
        remove_oldest(folder, MAX_BYTES)
    except (OSError, RuntimeError) as error:  # RuntimeError: no home is known
        logging.info("compiled programs are not kept: %s", error)
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    return folder


def make_private(folder):
    """Makes a folder to write that nobody else can change; OSError if that is impossible.

    Whoever can write to the cache can run code in the processes that read it.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.stat()
    if found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise PermissionError(f"others may write to {folder}")
    with tempfile.TemporaryFile(dir=folder):  # permissions say too little on a read-only disk
        pass


def remove_oldest(folder, max_bytes):
    """Removes the oldest files of a folder until the others take at most max_bytes."""
    files = [(path, path.stat()) for path in folder.rglob("*") if path.is_file()]
    total = 0
    for path, found in sorted(files, key=lambda file: file[1].st_mtime, reverse=True):
        total += found.st_size
        if total > max_bytes:
            path.unlink(missing_ok=True)
