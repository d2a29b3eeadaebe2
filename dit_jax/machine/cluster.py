"""Processes that train together: how they connect, compare their inputs and share failures."""

import collections
import concurrent.futures
import contextlib
import hashlib
import importlib.metadata
import itertools
import json
import os
import signal
import socket
import sys
import threading
import time
import urllib.request
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dit_jax import compat
from dit_jax.errors import UserError
from dit_jax.machine import peers

NOTICES = {  # keys of Google's metadata server: the values that announce the end of this machine
    "maintenance-event": ("TERMINATE_ON_HOST_MAINTENANCE",),
    "preempted": ("TRUE",),
}
POLL_SECONDS = 5  # between two reads of these keys
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
LAG = 1  # steps between a reduction over all processes and the read of its result
CONNECT_SECONDS = 300  # a process waits this long for the coordinator
_task_numbers = itertools.count()


def connect(*, coordinator=None, num_processes=None, process_id=None):
    """Connects the processes of this run; call it before any other use of jax.

    With explicit arguments, or automatically on a TPU pod (also on GKE) and in a Slurm step with
    several tasks. Otherwise the process runs alone. UserError for bad arguments or if the
    coordinator cannot be reached.
    """
    # Without gloo, CPUs of several processes cannot communicate; other devices ignore this option.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if coordinator or num_processes is not None or process_id is not None:
        if not coordinator or num_processes is None or process_id is None:
            raise UserError("coordinator, num_processes and process_id must be given together")
        if not 0 <= process_id < num_processes:
            raise UserError(f"process_id must be in 0 .. {num_processes - 1}, got {process_id}")
        host, colon, port = coordinator.rpartition(":")
        if not (host and colon and port.isdecimal() and 0 < int(port) < 2**16):
            raise UserError(f"coordinator must be host:port, got {coordinator!r}")
        if process_id:  # if it is unreachable, jax would kill this process
            _wait_for_coordinator(host, int(port))
        elif num_processes > 1:
            logging.info("waiting for %d processes at %s", num_processes, coordinator)
        _initialize(coordinator, num_processes, process_id)
    elif peers.are_found():
        _initialize()


def _wait_for_coordinator(host, port):
    """Returns when the coordinator accepts connections; UserError after CONNECT_SECONDS."""
    end = time.monotonic() + CONNECT_SECONDS
    while True:
        try:
            socket.create_connection((host, port), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                raise UserError(
                    f"coordinator must be reachable from all processes, got {host}:{port}: {error}"
                ) from error
        time.sleep(1)


def _initialize(*address):
    handlers = {signum: signal.getsignal(signum) for signum in STOP_SIGNALS}
    try:
        # In a thread, since jax waits in C++, where Python's signal handlers do not run.
        with concurrent.futures.ThreadPoolExecutor(1) as thread:
            thread.submit(jax.distributed.initialize, *address).result()
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"coordinator must be reachable from all processes: {reason}") from error
    finally:  # jax has replaced the handler of SIGTERM
        for signum, handler in handlers.items():
            signal.signal(signum, handler)


def check_same(**values):
    """UserError on every process if a value (JSON) on any process differs from process 0."""
    digests = [hashlib.sha256(json.dumps(x).encode()).digest()[:4] for x in values.values()]
    local = np.array([int.from_bytes(digest) for digest in digests], np.uint32)
    gathered = compat.process_allgather(local).reshape(-1, len(local))  # (processes, values)
    for process, row in enumerate(gathered):
        for name, first, other in zip(values, gathered[0], row, strict=True):
            if first != other:
                raise UserError(
                    f"{name} must be the same on all processes, "
                    f"got another value on process {process} than on 0"
                )


def any_of(flag):
    """Whether `flag` is true on any process; all processes must call it."""
    return max(_gather(flag)) > 0


def _gather(number):
    """The list of this number on every process."""
    if jax.process_count() == 1:
        return [number]
    return compat.process_allgather(np.array([number], np.int32)).ravel().tolist()


def of_first(values):
    """The list of floats of process 0, on every process; all processes must call it."""
    if jax.process_count() == 1:
        return values
    words = np.array(values, np.float64).view(np.uint32)  # jax would round to 32 bits
    gathered = compat.process_allgather(words).reshape(-1, len(words))  # (processes, words)
    return gathered[0].view(np.float64).tolist()


@contextlib.contextmanager
def together(*kinds):
    """A context: if one process raises here, all raise.

    A process without an error raises UserError, or, if every error is an instance of a class of
    `kinds`, the first such class. Inside, the processes must not wait for each other.
    """
    code, error = 0, None
    try:
        yield
    except Exception as raised:
        error = raised
        code = next((i for i, kind in enumerate(kinds, 2) if isinstance(error, kind)), 1)
    codes = [code for code in _gather(code) if code]
    if not codes:
        return
    lowest = min(codes)  # 1, an error outside `kinds`, wins
    if code == lowest:
        raise error
    kind = UserError if lowest == 1 else kinds[lowest - 2]
    raise kind("another process failed and prints the reason") from error


class Task:
    """Work in a background thread; if it fails on one process, the others stop waiting for it.

    All processes must create their tasks in the same order.
    """

    def __init__(self):
        self._name, self._waits = f"dit_jax/{next(_task_numbers)}", itertools.count()
        self._client = compat.distributed_client()  # None in a process that runs alone

    def fail(self):
        """Signals the other processes that this one failed."""
        if self._client:
            self._client.key_value_set(f"{self._name}/failed/{jax.process_index()}", "")

    def wait(self, *, timeout_ms, **_):
        """Waits until all processes make the same call; OSError if one failed.

        It has the signature of Orbax's barriers. Those would wait for a failed process until the
        timeout.
        """
        barrier = f"{self._name}/{next(self._waits)}"
        self._client.key_value_set(f"{barrier}/{jax.process_index()}", "")
        end = time.monotonic() + timeout_ms / 1000
        while len(self._client.key_value_dir_get(barrier)) < jax.process_count():
            for key, _ in self._client.key_value_dir_get(f"{self._name}/failed"):
                process = key.rpartition("/")[2]
                raise OSError(f"process {process} could not write and logs the reason")
            if time.monotonic() > end:
                raise OSError(f"a process did not finish writing in {timeout_ms / 1000:.0f} s")
            time.sleep(0.2)


def code_version():
    """A digest of this package's source, and the versions of jax, jaxlib, flax and optax."""
    package = Path(__file__).parents[1]
    files = sorted(package.rglob("*.py"))
    digest = hashlib.sha256()
    for path in files:
        digest.update(str(path.relative_to(package)).encode() + path.read_bytes())
    versions = [importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax")]
    return " ".join([digest.hexdigest(), *versions])


def agree(asked):
    """answer(): turns true at the same call on every process, shortly after any of them asks.

    asked() returns whether this process asks. Every process must call answer() equally often. The
    devices reduce the flags beside the training steps, and each result is read LAG calls later, so
    that no process waits.
    """
    if jax.process_count() == 1:
        return asked
    devices = np.array(jax.devices())
    mesh = jax.sharding.Mesh(devices, ("all",), axis_types=(AxisType.Auto,))
    one_per_device = NamedSharding(mesh, PartitionSpec("all"))
    any_true = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))
    pending = collections.deque()

    def answer():
        flag = np.array([asked()], np.int32)
        flags = jax.make_array_from_callback((devices.size,), one_per_device, lambda _: flag)
        pending.append(any_true(flags))
        return len(pending) > LAG and bool(pending.popleft())

    return answer


def watch_maintenance(notify):
    """Calls notify(notice) once if Google's cloud announces that it will stop this machine.

    A thread polls the metadata server, on TPU VMs or if GCE_METADATA_HOST names a server. See
    https://cloud.google.com/compute/docs/metadata/getting-live-migration-notice.
    """
    host = os.environ.get("GCE_METADATA_HOST") or (peers.is_on_pod() and "metadata.google.internal")
    if host:
        threading.Thread(target=_poll_notices, args=(host, notify), daemon=True).start()


def _poll_notices(host, notify):
    while True:
        for name, notices in NOTICES.items():
            url = f"http://{host}/computeMetadata/v1/instance/{name}"
            request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
            try:
                with urllib.request.urlopen(request, timeout=5) as response:
                    value = response.read().decode().strip()
            except OSError:  # try again at the next poll
                continue
            if value in notices:
                print(f"\n{name} {value}: stopping after this step", file=sys.stderr)
                notify(value)
                return
        time.sleep(POLL_SECONDS)
