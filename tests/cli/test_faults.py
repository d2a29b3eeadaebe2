"""What befalls a run: full and read-only disks, kills during saves, losses that jump."""

import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from small_run import (
    LAST,
    ROOT,
    SMALL,
    assert_same_end,
    finish,
    read_until,
    start,
    train_state,
    wait_for_step,
)

from dit_jax.checkpoint import steps, store

JUMPY = ("--config.run.spike_factor=1.5", "--config.run.max_rollbacks=20")


def test_a_run_that_diverges_stops_with_3_and_keeps_its_last_good_step(tmp_path):
    options = ("--config.train.learning_rate=1e30", "--config.train.warmup_steps=0")
    errors = finish(start(tmp_path / "run", *options, "--config.run.checkpoint_every=1"), code=3)
    message = errors.strip().splitlines()[-1]
    assert message.startswith("dit-train: ") and " at step " in message
    bad = int(message.split(" at step ")[1].split(";")[0])
    good = steps.latest(tmp_path / "run" / "checkpoints")
    assert good == bad - 1 >= 1 and message.endswith(f"; step {good} is kept")
    assert all(np.isfinite(x).all() for x in train_state(tmp_path / "run", "params").values())


def test_a_run_that_diverges_again_and_again_stops_after_the_stated_times(tmp_path):
    options = ("--config.train.learning_rate=1e30", "--config.train.warmup_steps=0")
    options += ("--config.run.checkpoint_every=1", "--config.run.max_rollbacks=2")
    errors = finish(start(tmp_path / "run", *options), code=3)
    assert "time 1 of 2" in errors and "time 2 of 2" in errors and "time 3" not in errors
    assert errors.splitlines()[-1].endswith(" is kept")


def test_a_run_that_diverges_before_its_first_save_says_so(tmp_path):
    options = ("--config.train.learning_rate=1e30", "--config.train.warmup_steps=0")
    errors = finish(start(tmp_path / "run", *options, "--config.run.max_rollbacks=1"), code=3)
    assert ": back to step 0, past the " in errors
    assert errors.splitlines()[-1].endswith("; nothing was saved before")


def test_a_run_that_spikes_goes_back_and_past_the_batches_also_when_it_is_killed(tmp_path):
    errors = finish(start(tmp_path / "whole", *JUMPY))
    meta = store.read_meta(tmp_path / "whole" / "checkpoints", LAST)
    bad, good = meta["rollbacks"][0]
    assert f"at step {bad}: back to step {good}, past the {bad - good} batches since" in errors
    assert good % 8 == 0 and 0 < good < bad
    for round in ("before the next save", "after it", "to the end"):
        process = start(tmp_path / "killed", *JUMPY)
        if round == "before the next save":
            read_until(process, f": back to step {good}, ")
        elif round == "after it":
            wait_for_step(process, tmp_path / "killed", min(bad + 8, LAST - 1))
        else:
            finish(process)
            break
        process.kill()
        process.communicate()
    assert_same_end(tmp_path / "killed", tmp_path / "whole")
    again = store.read_meta(tmp_path / "killed" / "checkpoints", LAST)
    assert again["rollbacks"] == meta["rollbacks"]


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_a_run_goes_back_is_heard(tmp_path, signum):
    process = start(tmp_path / "run", *JUMPY)
    said = read_until(process, ": back to step ")
    process.send_signal(signum)
    said += finish(process, code=42)
    step = steps.latest(tmp_path / "run" / "checkpoints")
    assert f"stopped after step {step}, which is saved" in said.splitlines()[-1]


def wait_for_a_save(process, workdir):
    while steps.latest(workdir / "checkpoints") is None:
        assert process.poll() is None
        time.sleep(0.01)


def test_a_disk_that_fills_up_and_is_emptied_again_costs_nothing(reference, tmp_path):
    """Full is a limit on the size of files: the system refuses to write in the same way."""
    process, directory = start(tmp_path / "run"), tmp_path / "run" / "checkpoints"
    wait_for_a_save(process, tmp_path / "run")
    _, hard = resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (1000, -1))
    said = read_until(process, " could not be saved: ")
    store.verify(directory, steps.latest(directory))
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (hard, hard))
    said += finish(process)
    assert "metrics.jsonl could not be written: " in said and "Traceback" not in said
    assert_same_end(tmp_path / "run", reference)


def test_a_folder_of_samples_that_is_gone_is_made_again(tmp_path):
    """And nothing is drawn before the first log, where there is nothing yet."""
    options = ("--config.run.sample_every=20", "--config.run.log_every=30")
    process = start(tmp_path / "run", *options)
    samples = tmp_path / "run" / "samples"
    while not (samples / "0000020.png").exists():
        assert process.poll() is None
        time.sleep(0.01)
    shutil.rmtree(samples)
    assert "Traceback" not in finish(process)
    assert {path.name for path in samples.iterdir()} >= {f"00000{LAST}.png"}
    assert (tmp_path / "run" / "loss.png").is_file()


def test_a_last_save_that_fails_is_said_and_the_one_before_is_there(tmp_path):
    process = start(tmp_path / "run")
    wait_for_a_save(process, tmp_path / "run")
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (1000, -1))
    said = finish(process, code=2)
    assert f"dit-train: step {LAST} could not be saved: " in said.splitlines()[-1]
    assert "Traceback" not in said
    newest = steps.latest(tmp_path / "run" / "checkpoints")
    assert f"the same command goes on from step {newest}" in said.splitlines()[-1]
    store.verify(tmp_path / "run" / "checkpoints", newest)


@pytest.mark.slow
def test_killed_in_twenty_saves_a_run_ends_as_if_nothing_had_been(tmp_path):
    often = ("--config.run.checkpoint_every=1", "--config.run.sample_every=60")
    finish(start(tmp_path / "whole", *often))
    seed = random.randrange(1000)
    print(f"seed of the moments: {seed}")
    pauses, rounds = random.Random(seed), 0
    directory = tmp_path / "run" / "checkpoints"
    while rounds < 20:
        before = steps.latest(directory) or 0
        process = start(tmp_path / "run", *often)
        wait_for_step(process, tmp_path / "run", before + 1)
        time.sleep(pauses.random() * 0.15)
        process.kill()
        process.communicate()
        rounds += 1
        newest = steps.latest(directory)
        if before:  # never a lost run: what was there is there, or something newer
            assert newest >= before
            store.verify(directory, newest)
    finish(start(tmp_path / "run", *often))
    assert_same_end(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
def test_a_flipped_bit_in_any_file_of_arrays_is_survived(reference, tmp_path):
    step = reference / "checkpoints" / str(LAST)
    names = [
        path.relative_to(step)
        for name in ("params", "ema", "opt_state")
        for path in (step / name).rglob("*")
        if path.is_file() and path.stat().st_size
    ]
    places = random.Random(0)
    restored = store.read_meta(reference / "checkpoints", LAST)["digests"]
    found = 0
    for name in names:
        run = shutil.copytree(reference, tmp_path / "run")
        path = run / "checkpoints" / str(LAST) / name
        data = bytearray(path.read_bytes())
        data[places.randrange(len(data))] ^= 1 << places.randrange(8)
        path.write_bytes(data)
        try:
            store.verify(run / "checkpoints", LAST)
        except store.Damaged as error:
            found += 1
            assert str(error).startswith(f"checkpoint {run}/checkpoints/{LAST} ")
        else:  # a bit that no value depends on: all is as it was saved
            assert store.read_meta(run / "checkpoints", LAST)["digests"] == restored
        shutil.rmtree(run)
    print(f"{found} of {len(names)} flipped bits change what is read")
    assert found > len(names) / 3


IN_A_SMALL_DISK = """
set -e
mount -t tmpfs -o size={size} tmpfs {disk}
"$@" --workdir={disk}/run &
{then}
wait $! && code=0 || code=$?
exit $code
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "size, then, code, said",
    [
        ("50m", "", 2, "dit-train: step 200 could not be saved: "),  # a step takes 20 MB
        (
            "100m",
            "until [ -d {disk}/run/checkpoints/16 ]; do sleep 0.1; done; "
            "mount --bind {disk}/run {disk}/run; mount -o remount,bind,ro {disk}/run; sleep 4; "
            "umount -l {disk}/run",
            0,
            "trained to step",
        ),
    ],
    ids=["full", "read-only"],
)
def test_a_small_disk_of_its_own(tmp_path, size, then, code, said):
    """In a namespace of mounts: a tmpfs that is really full, or read-only for a while."""
    disk = tmp_path / "disk"
    disk.mkdir()
    script = IN_A_SMALL_DISK.format(size=size, disk=disk, then=then.format(disk=disk))
    command = [sys.executable, "-m", "dit_jax.cli.train", *SMALL, "--config.run.total_steps=200"]
    done = subprocess.run(
        ["unshare", "-rm", "bash", "-c", script, "bash", *command],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    print(done.stderr)
    assert done.returncode == code and said in done.stderr
    assert (
        " could not be saved: " in done.stderr
        and "os_error" not in done.stderr
        and "Traceback" not in done.stderr
    )
