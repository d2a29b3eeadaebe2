"""Locks a run's directory."""

import contextlib

import jax

from dit_jax.machine import cluster, disk


@contextlib.contextmanager
def held(workdir):
    """A context in which no other run writes to workdir; UserError if one does already.

    A bucket cannot be locked; there the record of the run detects another writer at a log.
    """
    with contextlib.ExitStack() as stack:
        with cluster.together():
            disk.make_folder(workdir, "workdir")
            if jax.process_index() == 0 and disk.is_on_disk(workdir):
                stack.enter_context(disk.locked(workdir, "workdir"))
        yield
