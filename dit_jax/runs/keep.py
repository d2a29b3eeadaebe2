"""The saved steps of a run: written in the background, read back, and only then are others deleted.

A save that fails harms nothing that was saved before, and does not stop the training.
"""

import threading
import time

import jax
from absl import logging

from dit_jax.checkpoint import steps, store
from dit_jax.machine import cluster, disk

ATTEMPTS = 3  # of the last save of a run, with pauses between them
PAUSE = 2  # seconds; twice as long after every attempt


class Keeper:
    """Saves steps to a directory and keeps the `newest` of them, and the `best`: of lowest loss.

    verify: every step is read back and compared with its digests before an older one is deleted;
    one that is not as it was saved is set aside. With several processes all of them call every
    method, equally often. `saved` is the newest step that is known to be whole, None at first.
    """

    def __init__(self, directory, *, newest, best=0, verify=True):
        self._directory, self._newest, self._best = disk.path(directory), newest, best
        self._verify = verify
        self._writer = store.open_writer(barrier=lambda **words: self._task.wait(**words))
        self._step = self._task = self._thread = self._error = None
        self.saved = steps.latest(directory)
        self.failure = None  # in words, of the last save
        if jax.process_index() == 0:
            steps.clean(directory)

    def save(self, step, items, meta):
        """Starts to save and returns when the arrays are copied; `poll` tells what became of it."""
        self.wait()
        self._step, self._task, self.failure = step, cluster.Task(), None
        self._error = self._probe()
        if cluster.any_of(self._error is not None):  # Orbax would wait for the one that failed
            self._conclude()
            return
        try:
            store.save(self._writer, self._directory, step, items, meta)
        except Exception as error:  # of whatever it is that writes: files, TensorStore, a bucket
            self._error = error
            self._task.fail()
        self._thread = threading.Thread(target=self._finish, name="read back")
        self._thread.start()

    def save_now(self, step, items, meta):
        """Saves and waits for it, several times where it fails; `failure` says how it ended."""
        for attempt in range(ATTEMPTS):
            self.save(step, items, meta)
            self.wait()
            if self.failure is None:
                return
            if attempt + 1 < ATTEMPTS:
                time.sleep(PAUSE * 2**attempt)

    def poll(self):
        """Whether a save has failed and should be tried again; deletes what need not be kept."""
        if self._thread and not cluster.any_of(self._thread.is_alive()):
            self.wait()
        return self.failure is not None

    def wait(self):
        """Waits for the save that is under way, and deletes what need not be kept."""
        if self._thread:
            self._thread.join()
            self._thread = None
            self._conclude()

    def close(self):
        """Waits for this process's part of what is under way, also where another has failed."""
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
        """What a directory says where this process cannot write, else None."""
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
        """What the thread does: waits for the disk, and reads this process's share back."""
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
            error = error or OSError("another process could not write, and says why")
            self.failure = store.explain(error)
            logging.warning("step %d could not be saved: %s", self._step, self.failure)
        else:
            self.saved = self._step
        if jax.process_index() == 0:
            with disk.only_warned(f"{self._directory} could not be tidied"):
                self._clear(self._step) if failed else self._delete_old()

    def _clear(self, step):
        """Takes away what a save that failed has left."""
        steps.clean(self._directory)
        if step in steps.saved(self._directory):
            steps.set_aside(self._directory, step)

    def _delete_old(self):
        saved = steps.saved(self._directory)
        kept = {*saved[-self._newest :], *sorted(saved, key=self._loss)[: self._best]}
        for step in set(saved) - kept:
            steps.delete(self._directory, step)

    def _loss(self, step):
        try:
            return store.read_meta(self._directory, step).get("loss", float("inf"))
        except store.Damaged:
            return float("inf")
