"""dit-prepare from end to end: output, interruptions and wrong use."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time

import full_disk
import pictures
import pytest

from dit_jax.cli import prepare
from dit_jax.data import arrayrecord
from dit_jax.machine import disk

COMMAND = [sys.executable, "-m", "dit_jax.cli.prepare"]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A folder tree with 18 images of 3 classes."""
    path = tmp_path_factory.mktemp("source") / "tree"
    pictures.draw(path)
    return path


@pytest.fixture(scope="module")
def prepared(tree, tmp_path_factory):
    """What dit-prepare wrote from the tree with 4 shards."""
    out = tmp_path_factory.mktemp("out") / "data"
    subprocess.run([*COMMAND, tree, out, "--num_shards=4", "--processes=2"], check=True)
    return out


def test_repeated_command_and_any_number_of_processes_write_the_same_bytes(
    call, tree, prepared, tmp_path
):
    code, _, errors = call(prepare, tree, tmp_path / "x", "--num_shards=4", "--processes=1")
    assert code == 0, errors
    assert contents(tmp_path / "x") == contents(prepared)
    assert call(prepare, tree, tmp_path / "x", "--num_shards=4")[0] == 0  # already finished
    assert contents(tmp_path / "x") == contents(prepared)


@pytest.mark.parametrize("count", [2, pytest.param(5, marks=pytest.mark.slow)])
def test_resume_after_kill_9_writes_the_same_bytes(tmp_path, count):
    source, undisturbed, killed = (tmp_path / name for name in ("tree", "undisturbed", "killed"))
    pictures.draw(source, num_classes=8, per_class=50, low=100, high=200)
    command = [*COMMAND, source, killed, "--num_shards=100", "--processes=2"]
    rng = random.Random(0)
    for _ in range(count):
        process = subprocess.Popen(command)
        done = count_notes(killed) + rng.randint(1, 6)
        while process.poll() is None and count_notes(killed) < done:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.02))
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert count <= count_notes(killed) < 100
    assert subprocess.run(command).returncode == 0
    subprocess.run([*COMMAND, source, undisturbed, "--num_shards=100"], check=True)
    assert contents(killed) == contents(undisturbed)


def test_errors_about_a_finished_directory_are_one_line(refuse, tree, prepared, tmp_path):
    before = contents(prepared)
    line = refuse(prepare, tree, prepared, "--num_shards=3")
    assert "num_shards must be 4, as in the finished train of" in line
    pictures.draw(tmp_path / "two", num_classes=2)
    line = refuse(prepare, tmp_path / "two", prepared, "--split=test")
    assert "classes must be the same as in" in line and "but only one of both has c2" in line
    line = refuse(prepare, tmp_path / "two", prepared)
    assert "split must be a new name in" in line and "train, which has other images" in line
    assert contents(prepared) == before
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "manifest.json").write_text("{")
    assert "manifest.json must be JSON" in refuse(prepare, tree, tmp_path / "broken")


def test_skipped_and_ignored_files_are_logged(call, caplog, tree, tmp_path):
    source = shutil.copytree(tree, tmp_path / "tree")
    (source / "c1" / "text.png").write_text("text")
    (source / "c1" / "notes.txt").write_text("text")
    caplog.set_level("INFO")
    assert call(prepare, source, tmp_path / "out", "--max_corrupt=0.1")[0] == 0
    assert f"19 images of 3 classes in {source}: c0, c1, c2" in caplog.text
    assert "ignoring 1 file without an image, for example c1/notes.txt" in caplog.text
    assert "skipped c1/text.png: image must be a whole image file: " in caplog.text
    assert f"finished {tmp_path}/out: 18 images, 1 shard, 1 file skipped" in caplog.text


@pytest.mark.parametrize("moments", [[0.6], pytest.param([0.3, 0.6, 1.0], marks=pytest.mark.slow)])
def test_ctrl_c_prints_one_line_and_the_next_run_resumes(tree, prepared, tmp_path, moments):
    command = [*COMMAND, tree, tmp_path / "data", "--num_shards=4", "--processes=2"]
    for seconds in moments:
        process = subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        while process.poll() is None and not (tmp_path / "data" / ".lock").exists():
            time.sleep(0.001)
        time.sleep(seconds)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        errors = process.communicate()[1]
        assert process.returncode in (0, 130, -signal.SIGINT), (
            errors
        )  # 0: it had finished, -SIGINT: after the handler was removed
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


@pytest.mark.parametrize(
    "name, seconds",
    [
        ("SIGINT", 0),
        *(pytest.param(*x, marks=pytest.mark.slow) for x in [("SIGINT", 0.006), ("SIGTERM", 0)]),
    ],
)
def test_interrupt_while_workers_start_prints_one_line(tree, prepared, tmp_path, name, seconds):
    """A timer sends the signal from another thread: the thread that starts workers blocks it."""
    script = tmp_path / "script.py"
    script.write_text(INTERRUPTED.format(name=name, seconds=seconds))
    options = [tree, tmp_path / "data", "--num_shards=4", "--processes=2"]
    done = subprocess.run([sys.executable, script, *options], capture_output=True, text=True)
    assert done.returncode == 130
    assert done.stderr.splitlines()[1:] == ["dit-prepare: interrupted"]
    subprocess.run([*COMMAND, *options], check=True)
    assert contents(tmp_path / "data") == contents(prepared)


def test_full_disk_prints_one_line_and_the_next_run_resumes(tree, prepared, tmp_path):
    command = [*COMMAND, tree, tmp_path / "data", "--num_shards=4"]
    full_disk.expect_one_line(command)
    subprocess.run(command, check=True)
    assert contents(tmp_path / "data") == contents(prepared)


def count_notes(out):
    return len(list((out / arrayrecord.PROGRESS).glob("images-*.json")))


def test_second_run_in_the_same_directory_is_refused(refuse, tree, tmp_path):
    (tmp_path / "out").mkdir()
    with disk.locked(tmp_path / "out", "OUT"):
        line = refuse(prepare, tree, tmp_path / "out")
    assert "OUT must not be written by another run, got" in line


def test_errors_about_an_unfinished_directory_are_one_line(refuse, tree, tmp_path):
    out = tmp_path / "out"
    (tmp_path / "bad" / "c0").mkdir(parents=True)
    (tmp_path / "bad" / "c0" / "x.jpg").write_text("text")
    assert "max_corrupt must be at least 1, got 0.001" in refuse(prepare, tmp_path / "bad", out)
    (out / arrayrecord.PROGRESS / "refused").unlink()  # as if it was killed
    line = refuse(prepare, tree, out)
    assert "OUT must be new or unfinished with the same images and num_shards, got" in line


def test_other_images_may_take_the_place_of_refused_ones(call, refuse, tree, prepared, tmp_path):
    out = tmp_path / "out"
    (tmp_path / "bad" / "c0").mkdir(parents=True)
    (tmp_path / "bad" / "c0" / "x.jpg").write_text("text")
    for options in ([], ["--max_corrupt=1"]):  # then the class has no image
        refuse(prepare, tmp_path / "bad", out, *options)
    assert call(prepare, tree, out, "--num_shards=4")[0] == 0
    assert contents(out) == contents(prepared)


@pytest.mark.parametrize(
    "args, message",
    [
        ([], "takes SRC OUT, got ''"),
        (["{tree}"], "takes SRC OUT, got"),
        (["/nowhere", "{out}"], "SRC must exist, got /nowhere"),
        (["{tree}", "{out}", "--num_shards=19"], "num_shards must be at most 18, got 19"),
        (["{tree}", "{out}", "--split=a b"], "split must be a name like train, got 'a b'"),
        (
            ["{tree}", "{out}", "--max_corrupt=2"],
            "--max_corrupt must be a number in 0 .. 1, got 2",
        ),
        (["{tree}", "{tree}/out"], "OUT must be outside SRC, got"),
        (["{tree}", "{tree}/c0/000.jpg"], "OUT must be a folder or new, got the file"),
        (["{tree}", "{mine}"], "OUT must be new, empty or written by dit-prepare, got"),
        (["{tree}", "/proc/out"], "OUT must be where you may write, got /proc/out: No such"),
    ],
)
def test_wrong_use_prints_one_line(refuse, tree, tmp_path, args, message):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    paths = {"tree": tree, "out": tmp_path / "out", "mine": tmp_path / "mine"}
    assert message in refuse(prepare, *(arg.format(**paths) for arg in args))
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "thesis.txt"]
