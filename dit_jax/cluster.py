"""Several processes that train as one: how they meet and what they agree on."""

import collections
import glob
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import sys
import threading
import time
import urllib.request
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

NOTICES = {  # of Google's metadata server: what it says when the machine will be taken away
    "maintenance-event": ("TERMINATE_ON_HOST_MAINTENANCE",),
    "preempted": ("TRUE",),
}
SECONDS = 5  # between two questions for them
LAG = 2  # steps after which the processes read what they asked each other


def connect(*, coordinator=None, num_processes=None, process_id=None):
    """Joins the processes of this run; call it before any other use of jax.

    By explicit address, or as the machine says: a pod of TPUs (also on GKE) or a job of Slurm with
    several tasks. Elsewhere the process stays alone.
    """
    # CPUs of several processes have no other way to each other; other devices do not look at it.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if coordinator or num_processes is not None or process_id is not None:
        if not coordinator or num_processes is None or process_id is None:
            raise ValueError("coordinator, num_processes and process_id must be given together")
        if not 0 <= process_id < num_processes:
            raise ValueError(f"process_id must be in 0 .. {num_processes - 1}, got {process_id}")
        _initialize(coordinator, num_processes, process_id)
    elif _is_on_pod() or int(os.environ.get("SLURM_NTASKS", 1)) > 1:
        _initialize()


def _is_on_pod():
    if os.environ.get("JAX_PLATFORMS", "tpu") != "tpu":
        return False
    chips = glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")
    return bool(chips) and importlib.util.find_spec("libtpu") is not None


def _initialize(*address):
    try:
        jax.distributed.initialize(*address)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"coordinator must be one that all processes reach: {reason}") from error


def check_same(**things):
    """ValueError, on every process, where one has another value (JSON) than process 0 has."""
    digests = [hashlib.sha256(json.dumps(x).encode()).digest()[:4] for x in things.values()]
    mine = np.array([int.from_bytes(digest) for digest in digests], np.uint32)
    everyones = np.asarray(multihost_utils.process_allgather(mine)).reshape(-1, len(mine))
    for process, theirs in enumerate(everyones):
        for name, first, other in zip(things, everyones[0], theirs, strict=True):
            if first != other:
                raise ValueError(
                    f"{name} must be the same on all processes, but process {process} has another "
                    "than process 0"
                )


def any_of(answer):
    """Whether the answer of one of the processes is true."""
    if jax.process_count() == 1:
        return answer
    return bool(np.any(multihost_utils.process_allgather(np.array([answer], np.int32))))


def code_version():
    """A digest of this package's source and of what it computes with, as text."""
    package = Path(__file__).parent
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
