"""dit-train in several processes that form a cluster on this machine."""

import json
import resource
import shutil
import signal
import subprocess

import jax
import numpy as np
import processes
import pytest
from small_run import (
    ROOT,
    SHORT,
    assert_same_end,
    command,
    digests,
    finish_pod,
    losses,
    read_until,
    start_pod,
    wait_for_save,
    wait_for_step,
)
from small_run import SHORT_LAST as LAST

from dit_jax.checkpoint import steps, store
from dit_jax.machine import disk


def read_losses(workdir):
    return np.array([loss for loss, _ in losses(workdir).values()])


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """A whole run of two processes with two devices each."""
    path = tmp_path_factory.mktemp("pod") / "run"
    first, second = finish_pod(start_pod(path, 2))
    assert f"trained to step {LAST}" in first and second == ""  # only rank 0 logs
    return path


def test_two_processes_train_sample_and_save(reference):
    assert list(losses(reference)) == list(range(1, LAST + 1))
    assert (reference / "samples" / f"00000{LAST}.png").is_file()
    assert steps.latest(reference / "checkpoints") == LAST
    config = json.loads((reference / "config.json").read_text())
    assert config["mesh"]["shard_optimizer"]
    store.verify(reference / "checkpoints", LAST)


@pytest.mark.slow
def test_a_failed_save_a_signal_and_a_share_that_one_process_cannot_read(reference, tmp_path):
    run, directory = tmp_path / "run", tmp_path / "run" / "checkpoints"
    workers = start_pod(run, 2, "--config.run.total_steps=2000")
    wait_for_save(workers[0], run)
    _, hard = resource.prlimit(workers[1].pid, resource.RLIMIT_FSIZE, (1000, -1))
    errors = read_until(workers[0], "could not be saved: ")
    assert " could not be saved: process 1 could not write" in errors.splitlines()[-1]
    resource.prlimit(workers[1].pid, resource.RLIMIT_FSIZE, (hard, hard))
    workers[1].send_signal(signal.SIGTERM)
    first, second = finish_pod(workers, code=42)
    stopped = steps.latest(directory)
    assert all(f"stopped after step {stopped}, which is saved" in text for text in (first, second))
    assert " could not be saved: " in second and "Traceback" not in first + second
    store.verify(directory, stopped)
    before = read_losses(run)
    assert before[:LAST].tolist() == read_losses(reference)[:stopped].tolist()

    older = max(step for step in steps.saved(directory) if step < stopped)
    cut_share(directory / str(stopped) / "ema")
    last = stopped + 4
    first, second = finish_pod(start_pod(run, 2, f"--config.run.total_steps={last}"))
    assert f"moved to {run}/damaged/{stopped}, resuming from an older step" in first
    assert f"resuming {run} from step {older}" in first
    assert "cannot be read" in first + second
    store.verify(directory, last)
    assert read_losses(run)[:stopped].tolist() == before.tolist()


def cut_share(item):
    """Cuts the files that process 1 wrote for an item of a step."""
    for path in (item / "ocdbt.process_1" / "d").iterdir():
        path.write_bytes(path.read_bytes()[:100])


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_process_saves_the_same_step_on_all(reference, tmp_path, signum):
    workers = start_pod(tmp_path / "run", 2)
    wait_for_step(workers[0], tmp_path / "run", 1)
    workers[1].send_signal(signum)
    errors = finish_pod(workers, code=42)
    step = steps.latest(tmp_path / "run" / "checkpoints")
    assert 0 < step < LAST
    assert all(f"stopped after step {step}, which is saved" in text for text in errors)
    finish_pod(start_pod(tmp_path / "run", 2))
    assert_same_end(tmp_path / "run", reference, LAST)


@pytest.mark.slow
@pytest.mark.parametrize(
    "count, devices, options",
    [
        (1, 8, ["--config.mesh.fsdp=2"]),
        (1, 4, []),
        (1, 2, []),
        (4, 4, ["--config.mesh.tensor=2"]),
    ],
)
def test_a_run_resumes_with_other_numbers_of_processes_and_devices(
    reference, tmp_path, count, devices, options
):
    run = shutil.copytree(reference, tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / str(LAST))
    before = digests(run, 16)
    (first, *_) = finish_pod(start_pod(run, count, *options, devices=devices))
    assert f"resuming {run} from step 16" in first
    assert digests(run, 16) == before
    # float32 sums in another order
    np.testing.assert_allclose(read_losses(run), read_losses(reference), rtol=1e-4)
    assert jax.device_count() == 8  # in this process, which can read the checkpoint too


@pytest.mark.slow
@pytest.mark.parametrize("item", ["ema", "opt_state"])
def test_a_step_that_one_process_cannot_read_is_set_aside_by_all(reference, tmp_path, item):
    run = shutil.copytree(reference, tmp_path / "run")
    directory = run / "checkpoints"
    cut_share(directory / str(LAST) / item)
    first, second = finish_pod(start_pod(run, 2, f"--config.run.total_steps={LAST + 4}"))
    assert f"moved to {run}/damaged/{LAST}, resuming from an older step" in first
    assert f"resuming {run} from step {LAST - 8}" in first
    assert "cannot be read" in first + second
    store.verify(directory, LAST + 4)
    assert read_losses(run)[:LAST].tolist() == read_losses(reference).tolist()


def test_all_processes_exit_if_another_run_holds_the_workdir(tmp_path):
    with disk.locked(tmp_path, "workdir"):
        first, second = finish_pod(start_pod(tmp_path, 2), code=2)
    assert f"dit-train: workdir must not be written by another run, got {tmp_path}" in first
    assert "dit-train: another process failed and prints the reason" in second


def test_processes_with_different_configs_exit_and_name_the_config(tmp_path):
    address = processes.free_address()
    train = command(tmp_path / "run", *SHORT)
    workers = [
        subprocess.Popen(
            [*train, f"--config.seed={i}", *processes.flags(address, 2, i)],
            cwd=ROOT,
            env=processes.environment(),
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    for text in finish_pod(workers, code=2):
        line = "config must be the same on all processes, got another value on process 1 than on 0"
        assert f"dit-train: {line}" in text and "Traceback" not in text
    assert not (tmp_path / "run").exists()
