"""Faults during a run: full and read-only disks, kills in saves, bit flips, divergence."""

import random
import resource
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest
from small_run import (
    EVERY,
    LAST,
    ROOT,
    SMALL,
    assert_same_end,
    command,
    finish,
    kill,
    read_arrays,
    read_until,
    start,
    wait_for,
    wait_for_save,
    wait_for_step,
)

from dit_jax.checkpoint import steps, store
from dit_jax.runs import history

DIVERGES = ("--config.train.learning_rate=1e30", "--config.train.warmup_steps=0")
SPIKES = ("--config.run.spike_factor=1.5", "--config.run.max_rollbacks=20")


def test_a_run_that_diverges_again_after_its_rollbacks_exits_with_3_and_keeps_a_good_step(tmp_path):
    options = ("--config.run.checkpoint_every=1", "--config.run.max_rollbacks=2")
    errors = finish(start(tmp_path / "run", *DIVERGES, *options), code=3)
    assert "rollback 1 of 2" in errors and "rollback 2 of 2" in errors
    assert "rollback 3" not in errors
    assert ", skipping the 1 batches since" in errors
    message = errors.strip().splitlines()[-1]
    assert message.startswith("dit-train: ") and " at step " in message
    bad = int(message.split(" at step ")[1].split(";")[0])
    good = steps.latest(tmp_path / "run" / "checkpoints")
    assert good == bad - 1 >= 1 and message.endswith(f"; step {good} is kept")
    assert all(np.isfinite(x).all() for x in read_arrays(tmp_path / "run", "params").values())
    started, *rolled, ended = history.read(tmp_path / "run")
    assert started["event"] == "started" and ended["event"] == "diverged" and ended["step"] == bad
    assert [each["event"] for each in rolled] == ["rolled back"] * 2
    assert all(each["to"] == each["step"] - 1 for each in rolled)
    assert f"diverged at step {bad}" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.slow
def test_a_run_that_diverges_before_its_first_save_exits_with_3_and_names_no_step(tmp_path):
    errors = finish(start(tmp_path / "run", *DIVERGES, "--config.run.max_rollbacks=1"), code=3)
    assert ": rolled back to step 0, skipping the " in errors
    assert errors.splitlines()[-1].endswith("; nothing was saved before")


@pytest.fixture(scope="module")
def spiking(tmp_path_factory):
    """A run that rolls back when its loss spikes, and what it writes to stderr."""
    path = tmp_path_factory.mktemp("spiking") / "run"
    return path, finish(start(path, *SPIKES))


@pytest.mark.slow  # fast tests: the first one here rolls back, train/test_divergence.py has spikes
def test_a_rollback_skips_the_batches_since_the_saved_step(spiking):
    whole, errors = spiking
    bad, good = store.read_meta(whole / "checkpoints", LAST)["rollbacks"][0]
    assert f"at step {bad}: rolled back to step {good}, skipping the {bad - good} batches" in errors
    assert good % EVERY == 0 and 0 < good < bad


@pytest.mark.slow
@pytest.mark.parametrize(
    "signum, moment",
    [
        (signal.SIGINT, "before the next save"),
        (signal.SIGTERM, "before the next save"),
        (signal.SIGKILL, "before the next save"),
        (signal.SIGKILL, "after it"),
    ],
)
def test_a_run_that_is_stopped_at_a_rollback_ends_in_the_same_way(
    spiking, tmp_path, signum, moment
):
    whole, _ = spiking
    meta = store.read_meta(whole / "checkpoints", LAST)
    bad, good = meta["rollbacks"][0]
    rolled_back = f": rolled back to step {good}, skipping the {bad - good} batches since"
    run = tmp_path / "run"
    process = start(run, *SPIKES)
    if moment == "after it":
        wait_for_step(process, run, min(bad + EVERY, LAST - 1))
    else:
        read_until(process, rolled_back)
    process.send_signal(signum)
    if signum == signal.SIGKILL:
        process.communicate()
    else:
        last = finish(process, code=42).splitlines()[-1]
        step = steps.latest(run / "checkpoints")
        assert f"stopped after step {step}, which is saved" in last
    finish(start(run, *SPIKES))
    assert_same_end(run, whole)
    assert store.read_meta(run / "checkpoints", LAST)["rollbacks"] == meta["rollbacks"]


@pytest.mark.slow
def test_a_run_goes_through_a_full_disk_bit_identically(reference, tmp_path):
    """A limit on the size of files simulates it: the system refuses to write in the same way."""
    process, directory = start(tmp_path / "run"), tmp_path / "run" / "checkpoints"
    wait_for_save(process, tmp_path / "run")
    _, hard = resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (1000, -1))
    errors = read_until(process, " could not be saved: ")
    store.verify(directory, steps.latest(directory))
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (hard, hard))
    errors += finish(process)
    assert "metrics.jsonl could not be written: " in errors and "Traceback" not in errors
    assert_same_end(tmp_path / "run", reference)


@pytest.mark.slow
def test_a_deleted_folder_of_samples_is_made_again(tmp_path):
    """Also, the first samples come before the first log, when there is no loss to draw."""
    options = ("--config.run.sample_every=20", "--config.run.log_every=30")
    options += ("--config.run.total_steps=40",)
    process = start(tmp_path / "run", *options)
    samples = tmp_path / "run" / "samples"
    wait_for(process, (samples / "0000020.png").exists)
    shutil.rmtree(samples)
    assert "Traceback" not in finish(process)
    assert {path.name for path in samples.iterdir()} >= {"0000040.png"}
    assert (tmp_path / "run" / "loss.png").is_file()


def test_a_final_save_that_fails_exits_with_2_and_names_the_step_before(tmp_path):
    process = start(tmp_path / "run", "--config.run.total_steps=30")
    wait_for_save(process, tmp_path / "run")
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (1000, -1))
    errors = finish(process, code=2)
    assert "dit-train: step 30 could not be saved: " in errors.splitlines()[-1]
    assert "Traceback" not in errors
    newest = steps.latest(tmp_path / "run" / "checkpoints")
    assert f"the same command resumes from step {newest}" in errors.splitlines()[-1]
    store.verify(tmp_path / "run" / "checkpoints", newest)


@pytest.mark.parametrize("count", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_resume_is_bit_identical_after_kills_in_saves(reference, tmp_path, count):
    seed = random.randrange(1000)
    print(f"seed of the moments: {seed}")
    pauses, directory = random.Random(seed), tmp_path / "run" / "checkpoints"
    for _ in range(count):
        before = steps.latest(directory) or 0
        process = start(tmp_path / "run", "--config.run.checkpoint_every=1")
        wait_for_step(process, tmp_path / "run", before + 1)
        time.sleep(pauses.random() * 0.15)
        kill(process)
        newest = steps.latest(directory) or 0
        assert newest >= before  # the saved step is still there, or a newer one
        if newest:
            store.verify(directory, newest)
    finish(start(tmp_path / "run"))
    assert_same_end(tmp_path / "run", reference)


@pytest.mark.parametrize("count", [4, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_flipped_bit_in_a_file_of_arrays_is_detected_or_harmless(reference, tmp_path, count):
    """Of the `count` largest files."""
    step = reference / "checkpoints" / str(LAST)
    files = [
        path
        for name in ("params", "ema", "opt_state")
        for path in (step / name).rglob("*")
        if path.is_file() and path.stat().st_size
    ]
    names = [path.relative_to(step) for path in sorted(files, key=lambda x: -x.stat().st_size)]
    names, moments = names[:count], random.Random(0)
    saved, found = store.read_meta(reference / "checkpoints", LAST)["digests"], 0
    run = shutil.copytree(reference, tmp_path / "run")
    for name in names:
        path = run / "checkpoints" / str(LAST) / name
        data = path.read_bytes()
        flipped = bytearray(data)
        flipped[moments.randrange(len(data))] ^= 1 << moments.randrange(8)
        path.write_bytes(flipped)
        try:
            store.verify(run / "checkpoints", LAST)
        except store.Damaged as error:
            found += 1
            assert str(error).startswith(f"checkpoint {run}/checkpoints/{LAST} ")
        else:  # no value depends on that bit
            assert store.read_meta(run / "checkpoints", LAST)["digests"] == saved
        path.write_bytes(data)
    print(f"{found} of {len(names)} flipped bits change what is read")
    assert found > len(names) / 3


IN_A_SMALL_DISK = """
set -e
mount -t tmpfs -o size={size} tmpfs {disk}
"$@" &
{then}
wait $! && code=0 || code=$?
exit $code
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "size, then, code, message",
    [
        ("50m", "", 2, "dit-train: step 200 could not be saved: "),  # a step takes 20 MB
        (
            "100m",
            "while kill -0 $! && ! [ -d {disk}/run/checkpoints/8 ]; do sleep 0.1; done; "
            "mount --bind {disk}/run {disk}/run; mount -o remount,bind,ro {disk}/run; sleep 4; "
            "umount -l {disk}/run",
            0,
            "trained to step",
        ),
    ],
    ids=["full", "read-only"],
)
def test_a_real_disk_may_be_full_or_read_only(tmp_path, size, then, code, message):
    """In a mount namespace: a tmpfs that is really full, or read-only for a while."""
    disk = tmp_path / "disk"
    disk.mkdir()
    script = IN_A_SMALL_DISK.format(size=size, disk=disk, then=then.format(disk=disk))
    often = ("--config.run.total_steps=200", "--config.run.checkpoint_every=4")
    train = command(disk / "run", *SMALL, *often)
    done = subprocess.run(
        ["unshare", "-rm", "bash", "-c", script, "bash", *train],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    print(done.stderr)
    assert done.returncode == code and message in done.stderr
    assert (
        " could not be saved: " in done.stderr
        and "os_error" not in done.stderr
        and "Traceback" not in done.stderr
    )
