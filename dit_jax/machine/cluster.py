"""Several processes that train as one: how they meet and what they agree on."""

import collections
import contextlib
import glob
import hashlib
import importlib.metadata
import importlib.util
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
from jax._src import distributed  # for its client, as Orbax does: it is public nowhere
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dit_jax.errors import UserError

NOTICES = {  # of Google's metadata server: what it says when the machine will be taken away
    "maintenance-event": ("TERMINATE_ON_HOST_MAINTENANCE",),
    "preempted": ("TRUE",),
}
SECONDS = 5  # between two questions for them
LAG = 2  # steps after which the processes read what they asked each other
STOPS = (signal.SIGINT, signal.SIGTERM)
PATIENCE = 300  # seconds for all processes to come
_tasks = itertools.count()


def connect(*, coordinator=None, num_processes=None, process_id=None):
    """Joins the processes of this run; call it before any other use of jax.

    By explicit address, or as the machine says: a pod of TPUs (also on GKE) or a job of Slurm with
    several tasks. Elsewhere the process stays alone.
    """
    # CPUs of several processes have no other way to each other; other devices do not look at it.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if coordinator or num_processes is not None or process_id is not None:
        if not coordinator or num_processes is None or process_id is None:
            raise UserError("coordinator, num_processes and process_id must be given together")
        if not 0 <= process_id < num_processes:
            raise UserError(f"process_id must be in 0 .. {num_processes - 1}, got {process_id}")
        host, colon, port = coordinator.rpartition(":")
        if not (host and colon and port.isdecimal() and 0 < int(port) < 2**16):
            raise UserError(f"coordinator must be host:port, got {coordinator!r}")
        if process_id:  # jax would end this process
            _await(host, int(port))
        elif num_processes > 1:
            logging.info("waiting for %d processes at %s", num_processes, coordinator)
        _initialize(coordinator, num_processes, process_id)
    # Not SLURM_NTASKS, which a shell has too that salloc has started.
    elif _is_on_pod() or int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        _initialize()


def _await(host, port):
    """Returns when the coordinator answers; UserError where it does not."""
    end = time.monotonic() + PATIENCE
    while True:
        try:
            socket.create_connection((host, port), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                raise UserError(
                    f"coordinator must be one that all processes reach, got {host}:{port}: {error}"
                ) from error
        time.sleep(1)


def _is_on_pod():
    if "tpu" not in (os.environ.get("JAX_PLATFORMS") or "tpu").split(","):
        return False
    chips = glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")
    return bool(chips) and importlib.util.find_spec("libtpu") is not None


def _initialize(*address):
    # jax waits outside of Python, where no handler of a signal is called.
    handlers = {signum: signal.signal(signum, signal.SIG_DFL) for signum in STOPS}
    try:
        jax.distributed.initialize(*address)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"coordinator must be one that all processes reach: {reason}") from error
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)


def check_same(**things):
    """UserError, on every process, where one has another value (JSON) than process 0 has."""
    digests = [hashlib.sha256(json.dumps(x).encode()).digest()[:4] for x in things.values()]
    mine = np.array([int.from_bytes(digest) for digest in digests], np.uint32)
    everyones = np.asarray(multihost_utils.process_allgather(mine)).reshape(-1, len(mine))
    for process, theirs in enumerate(everyones):
        for name, first, other in zip(things, everyones[0], theirs, strict=True):
            if first != other:
                raise UserError(
                    f"{name} must be the same on all processes, but process {process} has another "
                    "than process 0"
                )


def any_of(answer):
    """Whether the answer of one of the processes is true."""
    return max(_gather(answer)) > 0


def _gather(number):
    """The numbers of all processes."""
    if jax.process_count() == 1:
        return [number]
    mine = np.array([number], np.int32)
    return np.asarray(multihost_utils.process_allgather(mine)).ravel().tolist()


@contextlib.contextmanager
def together(*kinds):
    """A context that ends with an error on all processes where it does on one.

    Those without one of their own raise a UserError; or one of the classes `kinds`, where all
    errors were such. Inside, the processes must not wait for each other.
    """
    mine, error = 0, None
    try:
        yield
    except Exception as raised:
        error = raised
        mine = next((i for i, kind in enumerate(kinds, 2) if isinstance(error, kind)), 1)
    codes = [code for code in _gather(mine) if code]
    if not codes:
        return
    code = min(codes)  # what is of no kind counts first
    if mine == code:
        raise error
    kind = UserError if code == 1 else kinds[code - 2]
    raise kind("another process has failed, and says why") from error


class Task:
    """Work beside the main thread, that ends on all processes where it fails on one.

    All processes make their tasks in the same order.
    """

    def __init__(self):
        self._name, self._waits = f"dit_jax/{next(_tasks)}", itertools.count()
        self._client = distributed.global_state.client  # None in a process that is alone

    def fail(self):
        """Tells the others that this process has failed."""
        if self._client:
            self._client.key_value_set(f"{self._name}/failed/{jax.process_index()}", "")

    def wait(self, *, timeout_ms, **_):
        """Waits for the same call of all processes; OSError where one has failed.

        As Orbax calls its barriers, which go on waiting for one that has failed.
        """
        place = f"{self._name}/{next(self._waits)}"
        self._client.key_value_set(f"{place}/{jax.process_index()}", "")
        end = time.monotonic() + timeout_ms / 1000
        while len(self._client.key_value_dir_get(place)) < jax.process_count():
            for name, _ in self._client.key_value_dir_get(f"{self._name}/failed"):
                raise OSError(f"process {name.rpartition('/')[2]} could not write, and says why")
            if time.monotonic() > end:
                raise OSError(f"a process has not written in {timeout_ms / 1000:.0f} s")
            time.sleep(0.2)


def code_version():
    """A digest of this package's source and of what it computes with, as text."""
    package = Path(__file__).parents[1]
    files = sorted(package.rglob("*.py"))
    digest = hashlib.sha256()
    for path in files:
        digest.update(str(path.relative_to(package)).encode() + path.read_bytes())
    versions = [importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax")]
    return " ".join([digest.hexdigest(), *versions])


def agree(asked):
    """answer() is true on all processes from the same call on, soon after asked() is on one.

    Every process must call it equally often. The answers travel beside the steps and are read
    `LAG` calls later, so that nobody waits for them.
    """
    if jax.process_count() == 1:
        return asked
    devices = np.array(jax.devices())
    mesh = jax.sharding.Mesh(devices, ("all",), axis_types=(AxisType.Auto,))
    place = NamedSharding(mesh, PartitionSpec("all"))
    any_of = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))
    pending = collections.deque()

    def answer():
        mine = np.array([asked()], np.int32)
        flags = jax.make_array_from_callback((devices.size,), place, lambda index: mine)
        pending.append(any_of(flags))
        return len(pending) > LAG and bool(pending.popleft())

    return answer


def watch_maintenance(tell):
    """Calls tell(notice), once, when Google's cloud says that it takes this machine away.

    On TPU VMs, or where GCE_METADATA_HOST names a metadata server; a thread asks it. See
    https://cloud.google.com/compute/docs/metadata/getting-live-migration-notice.
    """
    host = os.environ.get("GCE_METADATA_HOST") or (_is_on_pod() and "metadata.google.internal")
    if host:
        threading.Thread(target=_ask, args=(host, tell), daemon=True).start()


def _ask(host, tell):
    while True:
        for name, notices in NOTICES.items():
            url = f"http://{host}/computeMetadata/v1/instance/{name}"
            request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
            try:
                with urllib.request.urlopen(request, timeout=5) as answer:
                    said = answer.read().decode().strip()
            except OSError:  # it is asked again
                continue
            if said in notices:
                print(f"\n{name} {said}: stopping after this step", file=sys.stderr)
                tell(said)
                return
        time.sleep(SECONDS)
