"""dit-evaluate on other devices, in two processes, and killed: the same features, bit for bit."""

import subprocess
import sys
import time

import numpy as np
import processes
import pytest
import random_run

from dit_jax.evals import receipt

COUNT = 20
SMALL_SHARDS = (
    "from dit_jax.evals import features; features.SHARD = 6; "
    "from dit_jax.sampling import extractor; extractor.PER_DEVICE = 1; "
    "from dit_jax.cli import evaluate; evaluate.entry()"
)


@pytest.fixture(scope="module")
def words(inception_path, tmp_path_factory):
    """The words of a call that judges 20 samples of a model, without OUT."""
    folder = tmp_path_factory.mktemp("inputs")
    random_run.save(folder / "run")
    images = np.random.default_rng(0).integers(0, 256, (8, 8, 8, 3)).astype(np.uint8)
    np.savez(folder / "reference.npz", images)
    inputs = [f"--inception={inception_path}", f"--reference={folder}/reference.npz"]
    return [folder / "run", *inputs, f"--num_samples={COUNT}", "--bootstrap=0"]


def start(words, out, *flags, devices=1):
    line = [sys.executable, "-c", SMALL_SHARDS, *map(str, words), f"--out={out}", *flags]
    return subprocess.Popen(line, env=processes.environment(devices))


def finish(*workers):
    assert [worker.wait(timeout=500) for worker in workers] == [0] * len(workers)


@pytest.fixture(scope="module")
def usual(words, tmp_path_factory):
    """The receipt of an undisturbed evaluation on one device."""
    out = tmp_path_factory.mktemp("usual") / "out"
    finish(start(words, out))
    return receipt.read(out)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [["--batch_size=1"], ["--batch_size=7"], ["--batch_size=64"]])
def test_the_batch_size_changes_nothing(words, usual, tmp_path, flags):
    finish(start(words, tmp_path, *flags))
    assert receipt.check_repeated(usual, receipt.read(tmp_path))[1]
    assert receipt.read(tmp_path)["features"] == usual["features"]


@pytest.mark.slow
def test_eight_devices_find_what_one_finds(words, usual, tmp_path):
    finish(start(words, tmp_path, devices=8))
    assert receipt.read(tmp_path)["features"] == usual["features"]
    assert receipt.read(tmp_path)["scores"] == usual["scores"]


@pytest.mark.slow
def test_two_processes_find_what_one_finds(words, usual, tmp_path):
    address = processes.free_address()
    finish(*(start(words, tmp_path, *processes.flags(address, 2, i)) for i in range(2)))
    assert receipt.read(tmp_path)["features"] == usual["features"]
    assert receipt.read(tmp_path)["scores"] == usual["scores"]


@pytest.mark.slow
def test_a_killed_evaluation_goes_on(words, usual, tmp_path):
    """It is killed after each shard."""
    for number in range(3):
        worker = start(words, tmp_path)
        while not (tmp_path / "features" / f"{6 * number:07d}.npz").exists():
            assert worker.poll() is None
            time.sleep(0.05)
        worker.kill()
        worker.wait()
        assert not (tmp_path / "receipt.json").exists()
    finish(start(words, tmp_path))
    assert receipt.read(tmp_path)["features"] == usual["features"]
    assert receipt.read(tmp_path)["scores"] == usual["scores"]
