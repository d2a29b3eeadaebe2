"""Saves a run's steps in the background, reads them back, and only then deletes older ones.

A save that fails harms no earlier step and does not stop the training.
"""

import threading
import time

import jax
from absl import logging

from dit_jax.checkpoint import steps, store
from dit_jax.machine import cluster, disk

ATTEMPTS = 3  # for the final save of a run
PAUSE = 2  # seconds after the first attempt; doubles after each


class Keeper:
    """Saves steps to a directory and keeps the `newest` of them and the `best`; None: keeps all.

    best_by: the name of a number in the meta of a step; the lowest are best, and a step without one
    is not. verify: every step is read back and compared with its digests before an older one is
    deleted; a corrupt one is set aside. Every process must call every method equally often. `saved`
    is the newest step whose save is complete (and verified), None before the first.
    """

    def __init__(self, directory, *, newest, best=0, best_by="loss", verify=True):
        self._directory, self._newest, self._best = disk.path(directory), newest, best
        self._best_by, self._verify = best_by, verify
        self._writer = store.open_writer(barrier=lambda **options: self._task.wait(**options))
        self._step = self._task = self._thread = self._error = None
        self.saved = steps.latest(directory)
        self.failure = None  # why the last save failed, as text
        if jax.process_index() == 0:
            steps.clean(directory)

    def save(self, step, items, meta):
        """Starts a save and returns when the arrays are copied; `poll` says whether it failed."""
        self.wait()
        self._step, self._task, self.failure = step, cluster.Task(), None
        self._error = self._probe()
        if cluster.any_of(self._error is not None):  # Orbax would wait for that process
            self._conclude()
            return
        try:
            store.save(self._writer, self._directory, step, items, meta)
        except Exception as error:  # files, TensorStore and buckets raise many types
            self._error = error
            self._task.fail()
        self._thread = threading.Thread(target=self._finish, name="read back")
        self._thread.start()

    def save_now(self, step, items, meta):
        """Saves, waits, and tries again if it failed; `failure` says how it ended."""
        for attempt in range(ATTEMPTS):
            self.save(step, items, meta)
            self.wait()
            if self.failure is None:
                return
            if attempt + 1 < ATTEMPTS:
                time.sleep(PAUSE * 2**attempt)

    def poll(self):
        """Whether a save has failed and should be tried again; deletes steps not to be kept."""
        if self._thread and not cluster.any_of(self._thread.is_alive()):
            self.wait()
        return self.failure is not None

    def wait(self):
        """Waits for a save in progress, and deletes steps not to be kept."""
        if self._thread:
            self._thread.join()
            self._thread = None
            self._conclude()

    def close(self):
        """Waits for this process's part of a save in progress, even if another process failed."""
        if self._thread:
            self._thread.join()
            if self._error:
                logging.warning("step %d could not be saved: %s", self._step, self._error)
        self._writer.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _probe(self):
        """The exception if this process cannot write to the directory, else None."""
        if jax.process_index() != 0:
            return None
        probe = self._directory / ".probe"
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            probe.write_bytes(bytes(4096))
            probe.unlink()
        except Exception as error:
            return error
        return None

    def _finish(self):
        """Runs in the thread: waits for the disk, and reads this process's share back."""
        try:
            self._writer.wait_until_finished()
            if self._verify and self._error is None:
                share = jax.process_index(), jax.process_count()
                store.verify(self._directory, self._step, share=share)
        except Exception as error:
            self._error = self._error or error
            self._task.fail()

    def _conclude(self):
        error, self._error = self._error, None
        failed = cluster.any_of(error is not None)
        if failed:
            error = error or OSError("another process could not write and logs the reason")
            self.failure = store.explain(error)
            logging.warning("step %d could not be saved: %s", self._step, self.failure)
        else:
            self.saved = self._step
        if jax.process_index() == 0:
            with disk.only_warned(f"{self._directory} could not be tidied"):
                self._clear(self._step) if failed else self._delete_old()

    def _clear(self, step):
        """Removes what a failed save left behind."""
        steps.clean(self._directory)
        if step in steps.saved(self._directory):
            steps.set_aside(self._directory, step)

    def _delete_old(self):
        if self._newest is None:
            return
        saved = steps.saved(self._directory)
        kept = {*saved[-self._newest :], *sorted(saved, key=self._rank)[: self._best]}
        for step in set(saved) - kept:
            steps.delete(self._directory, step)

    def _rank(self, step):
        try:
            return store.read_meta(self._directory, step).get(self._best_by, float("inf"))
        except store.Damaged:
            return float("inf")
