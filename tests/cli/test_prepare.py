"""dit-prepare from end to end: what it writes, kills, and what it refuses."""

import collections
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import full_disk
import numpy as np
import pictures
import pytest
import tensorflow_datasets as tfds

from dit_jax.cli import prepare
from dit_jax.data import images, shards
from dit_jax.machine import disk

COMMAND = [sys.executable, "-m", "dit_jax.cli.prepare"]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A tree of 18 images of 3 classes, and the bytes of its files."""
    path = tmp_path_factory.mktemp("source") / "tree"
    return path, pictures.draw(path)


@pytest.fixture(scope="module")
def prepared(tree, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "data"
    subprocess.run([*COMMAND, tree[0], out, "--num_shards=4", "--processes=2"], check=True)
    return out


def test_tensorflow_datasets_opens_it_and_the_bytes_are_the_files(tree, prepared):
    builder = tfds.builder_from_directory(prepared)
    assert builder.info.splits["train"].num_examples == 18
    assert builder.info.features["label"].names == ["c0", "c1", "c2"]
    raw = builder.as_data_source("train", decoders={"image": tfds.decode.SkipDecoding()})
    names = [example["file_name"].decode() for example in raw]
    assert sorted(names) == sorted(tree[1]) and names != sorted(names)
    for example in raw:
        name = example["file_name"].decode()
        assert example["image"] == tree[1][name] and example["label"] == int(name[1])
    assert np.asarray(images.decode(raw[0]["image"])).ndim == 3
    assert "tensorflow" not in sys.modules


def test_the_manifest_counts_and_has_the_digest_of_every_shard(tree, prepared):
    known = shards.read_manifest(prepared)["splits"]["train"]
    assert known["num_examples"] == 18 and known["classes"] == {"c0": 6, "c1": 6, "c2": 6}
    assert len(known["shards"]) == 4 and known["corrupt"] == []
    sides = collections.Counter(str(min(images.decode(data).size)) for data in tree[1].values())
    assert known["short_sides"] == sides
    for name, shard in known["shards"].items():
        data = (prepared / name).read_bytes()
        assert shard["sha256"] == hashlib.sha256(data).hexdigest()
        assert shard["file_bytes"] == len(data)


def test_any_number_of_processes_writes_the_same_bytes(call, tree, prepared, tmp_path):
    code, _, errors = call(prepare, tree[0], tmp_path / "x", "--num_shards=4", "--processes=1")
    assert code == 0, errors
    assert contents(tmp_path / "x") == contents(prepared)
    assert call(prepare, tree[0], tmp_path / "x", "--num_shards=4")[0] == 0  # finished before
    assert contents(tmp_path / "x") == contents(prepared)


def test_kill_9_at_random_moments_changes_no_byte(tmp_path):
    source, whole, killed = (tmp_path / name for name in ("tree", "whole", "killed"))
    pictures.draw(source, num_classes=8, per_class=50, low=100, high=200)
    command = [*COMMAND, source, killed, "--num_shards=100", "--processes=2"]
    chance = random.Random(0)
    for _ in range(5):
        process = subprocess.Popen(command)
        done = count_notes(killed) + chance.randint(1, 6)
        while process.poll() is None and count_notes(killed) < done:
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.02))
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert 5 <= count_notes(killed) < 100
    assert subprocess.run(command).returncode == 0
    subprocess.run([*COMMAND, source, whole, "--num_shards=100"], check=True)
    assert contents(killed) == contents(whole)


def test_what_a_finished_directory_has_lost_is_written_again(call, tree, prepared, tmp_path):
    out = tmp_path / "data"
    shutil.copytree(prepared, out)
    one, two = sorted(out.glob("*.array_record*"))[:2]
    one.unlink()
    two.write_bytes(two.read_bytes()[:-100])
    (out / "dataset_info.json").write_text("{")
    assert call(prepare, tree[0], out)[0] == 0  # as many shards as there are
    assert contents(out) == contents(prepared)


def test_a_finished_directory_has_its_number_of_shards(refuse, tree, prepared, tmp_path):
    before = contents(prepared)
    line = refuse(prepare, tree[0], prepared, "--num_shards=3")
    assert "num_shards must be 4, as many as train of" in line
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "manifest.json").write_text("{")
    line = refuse(prepare, tree[0], tmp_path / "broken")
    assert "manifest.json must be JSON, but it is damaged" in line
    assert contents(prepared) == before


def test_ctrl_c_is_a_line_and_the_next_run_goes_on(tree, prepared, tmp_path):
    command = [*COMMAND, tree[0], tmp_path / "data", "--num_shards=4", "--processes=2"]
    for seconds in (0.3, 0.6, 1.0):
        process = subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        while process.poll() is None and not (tmp_path / "data" / ".lock").exists():
            time.sleep(0.001)
        time.sleep(seconds)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        errors = process.communicate()[1]
        assert process.returncode in (0, 130, -signal.SIGINT), errors  # or at the very end
        assert "Traceback" not in errors and "leaked" not in errors, errors
    subprocess.run(command, check=True)
    assert contents(tmp_path / "data") == contents(prepared)


INTERRUPTED = """
import os, signal, sys, threading
from multiprocessing.context import SpawnProcess
from dit_jax.cli import prepare

start = SpawnProcess.start

def interrupted(process):
    SpawnProcess.start = start  # once
    threading.Timer({seconds}, os.kill, (os.getpid(), signal.{name})).start()
    start(process)

if __name__ == "__main__":
    SpawnProcess.start = interrupted
    prepare.entry()
"""


@pytest.mark.parametrize("name, seconds", [("SIGINT", 0), ("SIGINT", 0.006), ("SIGTERM", 0)])
def test_an_interrupt_while_workers_start_is_a_line(tree, prepared, tmp_path, name, seconds):
    """Another thread has the signal, which the one that starts them has blocked."""
    script = tmp_path / "script.py"
    script.write_text(INTERRUPTED.format(name=name, seconds=seconds))
    options = [tree[0], tmp_path / "data", "--num_shards=4", "--processes=2"]
    done = subprocess.run([sys.executable, script, *options], capture_output=True, text=True)
    assert done.returncode == 130
    assert done.stderr.splitlines()[1:] == ["dit-prepare: interrupted"]
    subprocess.run([*COMMAND, *options], check=True)
    assert contents(tmp_path / "data") == contents(prepared)


def test_a_disk_that_is_full_is_a_line_and_the_next_run_goes_on(tree, prepared, tmp_path):
    command = [*COMMAND, tree[0], tmp_path / "data", "--num_shards=4"]
    full_disk.expect_one_line(command)
    subprocess.run(command, check=True)
    assert contents(tmp_path / "data") == contents(prepared)


def count_notes(out):
    return len(list((out / shards.PROGRESS).glob("images-*.json")))


def test_a_second_split_has_the_same_classes(call, refuse, tree, tmp_path):
    out = tmp_path / "data"
    assert call(prepare, tree[0], out)[0] == 0
    assert call(prepare, tree[0], out, "--split=validation")[0] == 0
    assert set(tfds.builder_from_directory(out).info.splits) == {"train", "validation"}
    pictures.draw(tmp_path / "two", num_classes=2)
    line = refuse(prepare, tmp_path / "two", out, "--split=test")
    assert "classes must be those of" in line and "c2 is in one of both only" in line
    before = contents(out)
    line = refuse(prepare, tmp_path / "two", out)
    assert "split must be a new one of" in line and "train, which has other images" in line
    assert contents(out) == before


def test_what_is_no_whole_image_is_left_out_up_to_a_limit(call, refuse, tree, tmp_path):
    source = tmp_path / "tree"
    pictures.draw(source)
    (source / "c1" / "cut.jpg").write_bytes(tree[1]["c1/000.jpg"][:300])
    (source / "c2" / "text.png").write_text("text")
    (source / "c2" / "notes.txt").write_text("text")
    line = refuse(prepare, source, tmp_path / "no", "--max_corrupt=0.05")  # 1 of 20
    assert "max_corrupt must be at least 0.1, got 0.05: 2 or more of 20 files are no whole" in line
    assert call(prepare, source, tmp_path / "out", "--max_corrupt=0.1")[0] == 0
    known = shards.read_manifest(tmp_path / "out")["splits"]["train"]
    assert known["num_examples"] == 18 and known["ignored"] == 1
    assert [name for name, _ in known["corrupt"]] == ["c1/cut.jpg", "c2/text.png"]
    assert call(prepare, source, tmp_path / "again", "--max_corrupt=0.1")[0] == 0
    assert contents(tmp_path / "again") == contents(tmp_path / "out")


def test_two_runs_do_not_write_one_directory(refuse, tree, tmp_path):
    (tmp_path / "out").mkdir()
    with disk.locked(tmp_path / "out", "OUT"):
        line = refuse(prepare, tree[0], tmp_path / "out")
    assert "OUT must not be written by another run, got" in line


def test_an_unfinished_run_goes_on_with_its_own_images_only(refuse, tree, tmp_path):
    out = tmp_path / "out"
    (tmp_path / "bad" / "c0").mkdir(parents=True)
    (tmp_path / "bad" / "c0" / "x.jpg").write_text("text")
    assert "max_corrupt must be at least 1, got 0.001" in refuse(prepare, tmp_path / "bad", out)
    line = refuse(prepare, tree[0], out)
    assert "OUT must be unfinished with the same images and num_shards, got" in line


@pytest.mark.parametrize(
    "args, message",
    [
        ([], "takes SRC OUT, got ''"),
        (["{tree}"], "takes SRC OUT, got"),
        (["/nowhere", "{out}"], "source must be a folder or a tar that exists, got /nowhere"),
        (["{tree}", "{out}", "--num_shards=19"], "num_shards must be at most 18, got 19"),
        (["{tree}", "{out}", "--split=a b"], "split must be a name as train, got 'a b'"),
        (["{tree}", "{out}", "--max_corrupt=2"], "max_corrupt"),
        (["{tree}", "{tree}/out"], "OUT must not lie in SRC, got"),
        (["{tree}", "{tree}/c0/000.jpg"], "OUT must be a folder or new, got the file"),
        (["{tree}", "{mine}"], "OUT must be new, empty or of dit-prepare, got"),
        (["{tree}", "/proc/out"], "No such file or directory: '/proc/out'"),
    ],
)
def test_wrong_use_is_one_line(refuse, tree, tmp_path, args, message):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    paths = {"tree": tree[0], "out": tmp_path / "out", "mine": tmp_path / "mine"}
    assert message in refuse(prepare, *(arg.format(**paths) for arg in args))
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "thesis.txt"]
