"""dit-train in several real processes that form a cluster, on one machine."""

import json
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import processes
import pytest

from dit_jax.checkpoint import steps, store
from dit_jax.machine import disk
from dit_jax.runs import record

ROOT = Path(__file__).parents[2]
LAST = 24
NOISE = re.compile(r"^\[Gloo\]|jax\._src\.distributed")  # the second of jax 0.7
SMALL = (
    "--config=configs/digits.py",
    "--config.model.size=Ti",
    "--config.model.patch_size=4",
    "--config.train.batch_size=16",
    "--config.train.decay_steps=0",
    "--config.train.warmup_steps=0",
    f"--config.run.total_steps={LAST}",
    "--config.run.log_every=1",
    "--config.run.checkpoint_every=8",
    "--config.run.sample_every=24",
    "--config.run.num_samples=4",
    "--config.sampling.num_steps=ddim4",
)


def start(workdir, count, *options, devices=4):
    """The processes of a run, with so many devices together."""
    address = processes.free_address()
    flag = f"--xla_force_host_platform_device_count={devices // count}"
    command = [sys.executable, "-m", "dit_jax.cli.train", *SMALL, f"--workdir={workdir}", *options]
    return [
        subprocess.Popen(
            [*command, *(processes.flags(address, count, i) if count > 1 else [])],
            cwd=ROOT,
            env=processes.environment() | {"XLA_FLAGS": flag},
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(count)
    ]


def finish(workers, code=0):
    errors = [worker.communicate(timeout=280)[1] for worker in workers]
    lines = [[line for line in text.splitlines() if not NOISE.search(line)] for text in errors]
    errors = ["\n".join(kept) for kept in lines]
    assert [worker.returncode for worker in workers] == [code] * len(workers), errors
    return errors


def read_state(workdir, step=LAST):
    meta = store.read_meta(workdir / "checkpoints", step)
    return meta["digests"]


def read_losses(workdir):
    return np.array([line["loss"] for line in record.read(workdir / "metrics.jsonl")])


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """A whole run of two processes with two devices each."""
    path = tmp_path_factory.mktemp("pod") / "run"
    first, second = finish(start(path, 2))
    assert "trained to step 24" in first and second == ""  # process 0 alone speaks
    return path


def test_two_processes_train_sample_and_save(reference):
    assert [line["step"] for line in record.read(reference / "metrics.jsonl")] == list(range(1, 25))
    assert (reference / "samples" / "0000024.png").is_file()
    assert steps.latest(reference / "checkpoints") == LAST
    config = json.loads((reference / "config.json").read_text())
    assert config["mesh"]["shard_optimizer"]
    store.verify(reference / "checkpoints", LAST)


@pytest.mark.parametrize(
    "signum", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_signal_to_one_saves_one_step_on_all(reference, tmp_path, signum):
    workers = start(tmp_path / "run", 2)
    while not record.read(tmp_path / "run" / "metrics.jsonl"):
        assert workers[0].poll() is None
    workers[1].send_signal(signum)
    errors = finish(workers, code=42)
    step = steps.latest(tmp_path / "run" / "checkpoints")
    assert 0 < step < LAST
    assert all(f"stopped after step {step}, which is saved" in text for text in errors)
    finish(start(tmp_path / "run", 2))
    assert read_state(tmp_path / "run") == read_state(reference)  # bit for bit


@pytest.mark.slow
@pytest.mark.parametrize(
    "count, devices, options",
    [(1, 4, []), (1, 8, ["--config.mesh.fsdp=2"]), (1, 2, []), (4, 4, ["--config.mesh.tensor=2"])],
)
def test_a_run_goes_on_with_other_processes_and_devices(
    reference, tmp_path, count, devices, options
):
    finish(start(tmp_path / "run", 2, "--config.run.total_steps=16"))
    before = read_state(tmp_path / "run", 16)
    finish(start(tmp_path / "run", count, *options, devices=devices))
    assert read_state(tmp_path / "run", 16) == before
    np.testing.assert_allclose(read_losses(tmp_path / "run"), read_losses(reference), rtol=1e-4)
    assert jax.device_count() == 8  # of this process, which restores what they wrote


@pytest.mark.parametrize("item", ["ema", pytest.param("opt_state", marks=pytest.mark.slow)])
def test_a_file_that_one_process_cannot_read_is_set_aside_by_all(reference, tmp_path, item):
    run = shutil.copytree(reference, tmp_path / "run")
    directory = run / "checkpoints"
    for path in (directory / str(LAST) / item / "ocdbt.process_1" / "d").iterdir():
        path.write_bytes(path.read_bytes()[:100])
    first, second = finish(start(run, 2, f"--config.run.total_steps={LAST + 4}"))
    assert f"set aside in {run}/damaged/{LAST}, going on from an older one" in first
    assert f"going on from step {LAST - 8}" in first and "cannot be read" in first + second
    store.verify(directory, LAST + 4)
    assert read_losses(run)[:LAST].tolist() == read_losses(reference).tolist()


def test_one_process_that_cannot_write_is_a_failed_save_on_all(reference, tmp_path):
    workers = start(tmp_path / "run", 2, "--config.run.total_steps=2000")
    directory, said = tmp_path / "run" / "checkpoints", ""
    while steps.latest(directory) is None:
        assert workers[0].poll() is None
    _, hard = resource.prlimit(workers[1].pid, resource.RLIMIT_FSIZE, (1000, -1))
    for line in workers[0].stderr:
        said += line
        if "could not be saved: " in line:
            break
    assert said.splitlines()[-1].endswith(
        " could not be saved: process 1 could not write and logs the reason"
    )
    resource.prlimit(workers[1].pid, resource.RLIMIT_FSIZE, (hard, hard))
    workers[0].send_signal(signal.SIGTERM)
    first, second = finish(workers, code=42)
    step = steps.latest(directory)
    assert f"stopped after step {step}, which is saved" in first
    assert " could not be saved: " in second and "Traceback" not in first + second
    store.verify(directory, step)


def test_a_workdir_that_another_run_holds_ends_all(tmp_path):
    with disk.locked(tmp_path, "workdir"):
        first, second = finish(start(tmp_path, 2), code=2)
    assert f"dit-train: workdir must not be written by another run, got {tmp_path}" in first
    assert "dit-train: another process failed and prints the reason" in second


def test_processes_that_disagree_say_so(tmp_path):
    address = processes.free_address()
    command = [sys.executable, "-m", "dit_jax.cli.train", *SMALL, f"--workdir={tmp_path}/run"]
    workers = [
        subprocess.Popen(
            [*command, f"--config.seed={i}", *processes.flags(address, 2, i)],
            cwd=ROOT,
            env=processes.environment(),
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    for text in finish(workers, code=2):
        line = "config must be the same on all processes, got another value on process 1 than on 0"
        assert f"dit-train: {line}" in text and "Traceback" not in text
    assert not (tmp_path / "run").exists()
