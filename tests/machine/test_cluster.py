"""What of several processes can be tested in one; tests/cli/test_pod.py has real ones."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import processes
import pytest
import small_run

from dit_jax.machine import cluster


@pytest.fixture
def joined(monkeypatch):
    """The calls of jax.distributed.initialize, which does nothing."""
    calls = []
    monkeypatch.setattr(cluster.jax.distributed, "initialize", lambda *words: calls.append(words))
    for name in ("SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    return calls


@pytest.mark.parametrize(
    "variables, count",
    [
        ({}, 0),
        ({"SLURM_JOB_ID": "5", "SLURM_NTASKS": "8"}, 0),  # in a shell of salloc, without srun
        ({"SLURM_JOB_ID": "5", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1"}, 0),
        ({"SLURM_JOB_ID": "5", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "8"}, 1),
    ],
)
def test_only_the_tasks_of_a_step_of_slurm_meet(joined, monkeypatch, variables, count):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    cluster.connect()
    assert joined == [()] * count


@pytest.mark.parametrize(
    "platforms, expected",
    [(None, True), ("", True), ("tpu", True), ("tpu,cpu", True), ("cpu", False), ("cuda", False)],
)
def test_a_pod_is_known_by_its_chips(joined, monkeypatch, platforms, expected):
    monkeypatch.setattr(cluster.glob, "glob", lambda pattern: ["/dev/accel0"])
    monkeypatch.setattr(cluster.importlib.util, "find_spec", lambda name: name)  # of libtpu
    if platforms is None:
        monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    else:
        monkeypatch.setenv("JAX_PLATFORMS", platforms)
    cluster.connect()
    assert joined == [()] * expected


@pytest.mark.parametrize(
    "address, message",
    [
        ("here", "coordinator must be host:port, got 'here'"),
        ("here:x", "coordinator must be host:port, got 'here:x'"),
        (":1234", "coordinator must be host:port, got ':1234'"),
        ("localhost:99999", "coordinator must be host:port, got 'localhost:99999'"),
        ("localhost:1", "must be one that all processes reach, got localhost:1: .*refused"),
    ],
)
def test_a_coordinator_that_does_not_answer_is_named(joined, monkeypatch, address, message):
    monkeypatch.setattr(cluster, "PATIENCE", 0)
    with pytest.raises(ValueError, match=message):
        cluster.connect(coordinator=address, num_processes=2, process_id=1)
    assert joined == []


def test_the_first_process_knows_a_wrong_address_too(joined):
    with pytest.raises(ValueError, match="coordinator must be host:port, got 'here'"):
        cluster.connect(coordinator="here", num_processes=2, process_id=0)


def test_a_process_that_waits_for_others_can_be_stopped():
    command = [sys.executable, "-m", "dit_jax.cli.train", "--config=configs/digits.py"]
    command += ["--workdir=/tmp/none", *processes.flags(processes.free_address(), 2, 0)]
    root = Path(__file__).parents[1]
    process = subprocess.Popen(command, cwd=root, stderr=subprocess.PIPE, text=True)
    small_run.read_until(process, "waiting for 2 processes at localhost:")
    time.sleep(1)
    process.terminate()
    process.communicate(timeout=20)
    assert process.returncode == -signal.SIGTERM


def pretend(monkeypatch, others):
    """The other processes bring these numbers to every gathering."""
    monkeypatch.setattr(cluster, "_gather", lambda mine: [mine, *others])


def test_what_ends_together_ends_with_the_error_of_one():
    with cluster.together():
        pass
    with pytest.raises(KeyError, match="mine"), cluster.together():
        raise KeyError("mine")


@pytest.mark.parametrize(
    "mine, others, raised, message",
    [
        (None, [0, 0], None, ""),
        (None, [0, 1], ValueError, "another process has failed"),
        (None, [2, 0], KeyError, "another process has failed"),
        (KeyError("mine"), [0, 0], KeyError, "mine"),
        (KeyError("mine"), [2, 0], KeyError, "mine"),
        (KeyError("mine"), [1, 2], ValueError, "another process has failed"),
        (OSError("mine"), [2, 0], OSError, "mine"),
    ],
)
def test_all_processes_raise_the_same_kind(monkeypatch, mine, others, raised, message):
    pretend(monkeypatch, others)

    def work():
        with cluster.together(KeyError):
            if mine:
                raise mine

    if raised:
        with pytest.raises(raised, match=message):
            work()
    else:
        work()


class Client:
    """The keys and values of all processes, as jax's client has them."""

    def __init__(self):
        self.values = {}

    def key_value_set(self, key, value):
        self.values[key] = value

    def key_value_dir_get(self, folder):
        return [item for item in self.values.items() if item[0].startswith(f"{folder}/")]


@pytest.fixture
def task(monkeypatch):
    """A task of process 0 of two, and the client of both."""
    client = Client()
    monkeypatch.setattr(cluster.distributed.global_state, "client", client)
    monkeypatch.setattr(cluster.jax, "process_count", lambda: 2)
    return cluster.Task(), client


def test_a_task_waits_for_the_others(task):
    one, client = task
    client.values[f"{one._name}/0/1"] = ""
    one.wait(key="of Orbax", timeout_ms=10_000)
    with pytest.raises(OSError, match="a process has not written in 0 s"):
        one.wait(key="of Orbax", timeout_ms=1)  # there the other one does not come


def test_a_task_that_has_failed_elsewhere_is_not_waited_for(task):
    one, client = task
    client.values[f"{one._name}/failed/1"] = ""
    started = time.monotonic()
    with pytest.raises(OSError, match="process 1 could not write, and says why"):
        one.wait(key="of Orbax", timeout_ms=60_000)
    assert time.monotonic() - started < 5
    one.fail()
    assert f"{one._name}/failed/0" in client.values
