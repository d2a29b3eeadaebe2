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
SHARD = 6  # images in a file of features, which are read and computed together
PROGRAM = (
    "import sys; from dit_jax.evals import features; features.SHARD = int(sys.argv.pop(1)); "
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


def start(words, out, *flags, devices=1, shard=SHARD):
    line = [sys.executable, "-c", PROGRAM, str(shard), *map(str, words), f"--out={out}", *flags]
    return subprocess.Popen(line, env=processes.environment(devices))


def finish(*workers):
    assert [worker.wait(timeout=500) for worker in workers] == [0] * len(workers)


@pytest.fixture(scope="module")
def usual(words, tmp_path_factory):
    """The receipt of an undisturbed evaluation on one device."""
    out = tmp_path_factory.mktemp("usual") / "out"
    finish(start(words, out))
    return receipt.read(out)


def kept(out):
    """{name: array} of the numbers, labels and features of all images, in their order."""
    files = [np.load(path) for path in sorted((out / "features").glob("*.npz"))]
    names = files[0].keys() - {"identity"}
    return {name: np.concatenate([file[name] for file in files]) for name in names}


@pytest.mark.slow
@pytest.mark.parametrize("shard", [1, 7, 64])
def test_the_number_of_images_at_a_time_changes_nothing(words, usual, tmp_path, shard):
    finish(start(words, tmp_path / "usual"), start(words, tmp_path / "other", shard=shard))
    expected, found = kept(tmp_path / "usual"), kept(tmp_path / "other")
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)
    assert receipt.read(tmp_path / "other")["scores"] == usual["scores"]


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
