"""Runs whose workdir is in a bucket: killed, stopped, resumed, sampled from, refused."""

import io
import itertools
import json
import signal

import numpy as np
import pytest
import random_run
from PIL import Image
from small_run import SHORT, assert_same_end, finish, finish_pod, start, start_pod
from small_run import SHORT_LAST as LAST

from dit_jax.checkpoint import steps
from dit_jax.cli import bench, convert, encode, evaluate, prepare, sample, train, verify
from dit_jax.machine import disk
from dit_jax.sampling import trained

PIXELS = ("--config=configs/imagenet256.py", "--config.data.space=pixels")


def kill_at(storage, workers, name):
    """Kills the processes when one begins to write an object of this name; refuses the write."""

    def may_write(written):
        if not written.endswith(name):
            return True
        for worker in workers:
            worker.kill()
        return False

    storage.allow(write=may_write)
    for worker in workers:
        worker.communicate(timeout=280)
        assert worker.returncode == -signal.SIGKILL
    storage.allow()


def stop_at(storage, worker, lines):
    """Sends SIGTERM to a process when it writes line number `lines` of the record."""
    writes = itertools.count()  # the first write only drops lines

    def may_write(written):
        if written.endswith("metrics.jsonl") and next(writes) == lines:
            worker.send_signal(signal.SIGTERM)
        return True

    storage.allow(write=may_write)


def empty(storage, path):
    """Replaces an object by an empty one."""
    key = ("tests", str(path).removeprefix("gs://tests/"))
    storage.objects[key] = storage.objects[key]._replace(content=b"")


@pytest.mark.slow
def test_resume_in_a_bucket_after_kill_stop_and_damage_gives_the_result_of_a_disk(
    storage, bucket_path, tmp_path
):
    finish(start(tmp_path / "run", config=SHORT))
    process = start(bucket_path, config=SHORT)
    kill_at(storage, [process], "checkpoints/16/commit_success.txt")
    assert steps.latest(bucket_path / "checkpoints") == 8
    assert disk.exists(bucket_path / "checkpoints" / "16" / "_CHECKPOINT_METADATA")
    process = start(bucket_path, config=SHORT)
    stop_at(storage, process, 10)  # in the step after 18, while step 16 is still being saved
    errors = finish(process, code=42)
    assert f"resuming {bucket_path} from step 8" in errors
    stopped = steps.latest(bucket_path / "checkpoints")
    assert f"stopped after step {stopped}, which is saved" in errors and stopped > 16
    empty(storage, bucket_path / "checkpoints" / str(stopped) / "params" / "manifest.ocdbt")
    errors = finish(start(bucket_path, config=SHORT))
    assert f"moved to {bucket_path}/damaged/{stopped}, resuming from an older step" in errors
    assert f"resuming {bucket_path} from step 16" in errors
    assert_same_end(bucket_path, tmp_path / "run", LAST)
    assert json.loads((bucket_path / "config.json").read_text())["model"]["size"] == "Pi"
    names = {path.name for path in (tmp_path / "run").iterdir()}
    expected = names - {"report.html"} | {"damaged"}
    assert {path.name for path in bucket_path.iterdir()} == expected
    for name in ("loss.png", "samples/0000024.png"):
        ours, theirs = ((path / name).read_bytes() for path in (bucket_path, tmp_path / "run"))
        with Image.open(io.BytesIO(ours)) as one, Image.open(io.BytesIO(theirs)) as other:
            assert one.size == other.size
            assert name == "loss.png" or np.array_equal(one, other)


@pytest.mark.slow
def test_resume_of_two_processes_in_a_bucket_after_kill_and_stop(storage, bucket_path, tmp_path):
    finish_pod(start_pod(tmp_path / "run", 2))
    workers = start_pod(bucket_path, 2)
    kill_at(storage, workers, "checkpoints/16/commit_success.txt")
    workers = start_pod(bucket_path, 2)
    stop_at(storage, workers[1], 10)
    assert f"resuming {bucket_path} from step 8" in finish_pod(workers, code=42)[0]
    finish_pod(start_pod(bucket_path, 2))
    assert_same_end(bucket_path, tmp_path / "run", LAST)


def test_sample_and_evaluate_read_a_checkpoint_in_a_bucket(
    call, bucket_path, tmp_path, monkeypatch
):
    for path in (bucket_path, tmp_path / "run"):
        random_run.save(path)
        out = f"--out={tmp_path}/{path.name}.npz"
        assert call(sample, f"--checkpoint={path}", "--labels=3,1,4", out)[0] == 0
    ours, theirs = (np.load(tmp_path / f"{name}.npz") for name in (bucket_path.name, "run"))
    np.testing.assert_array_equal(ours["arr_0"], theirs["arr_0"])
    blank = np.zeros((2500, 8, 8, 1), np.uint8)
    monkeypatch.setattr(trained.LoadedDiT, "sample", lambda self, labels, **_: blank[: len(labels)])
    assert call(evaluate, f"--checkpoint={bucket_path}")[0] == 0
    assert json.loads((bucket_path / "judgments.json").read_text())["step"] == 30


@pytest.mark.parametrize(
    "command, args, message",
    [
        (train, [*SHORT, "--workdir=gs://nowhere/run"], "workdir must be in a bucket that exists"),
        (
            train,
            [*SHORT, "--workdir=s3://tests/run"],
            "on a disk or start with gs://BUCKET, got s3",
        ),
        (
            train,
            [*PIXELS, "--config.data.path=gs://tests/data"],
            "data.path must exist, got gs://tests/data",
        ),
        (
            train,
            [*PIXELS, "--config.data.path=gs://nowhere/data"],
            "data.path must exist, got gs://nowhere/data",
        ),
        (
            train,
            [*PIXELS, "--config.data.path=s3://tests/data"],
            "a path must be on a disk or start with gs://BUCKET, got s3://tests/data",
        ),
        (
            sample,
            ["--checkpoint=gs://tests/none", "--labels=1"],
            "checkpoint must be a directory with a saved step, got gs://tests/none",
        ),
        (
            sample,
            ["--checkpoint=gs://tests/none", "--labels=1", "--out=gs://tests/x.png"],
            "a path must be on a disk, got gs://tests/x.png: mount the bucket",
        ),
        (prepare, ["gs://tests/images", "out"], "must be on a disk, got gs://tests/images"),
        (convert, ["vae", "in", "gs://tests/vae"], "must be on a disk, got gs://tests/vae"),
    ],
)
def test_a_bucket_in_a_wrong_argument_is_one_line_of_error(
    refuse, storage, command, args, message, tmp_path
):
    if command is train and not args[-1].startswith("--workdir"):
        args = [*args, f"--workdir={tmp_path}/run"]
    assert message in refuse(command, *args)


@pytest.mark.parametrize(
    "command, args",
    [
        (train, [*SHORT, "--workdir=gs://nowhere/run"]),
        (train, ["gs://nowhere/run"]),
        (train, [*PIXELS, "--config.data.path=gs://nowhere/data", "--workdir={tmp}/run"]),
        (train, [*SHORT, "--init_from=gs://nowhere/run", "--workdir={tmp}/run"]),
        (bench, ["data", *PIXELS, "--config.data.path=gs://nowhere/data"]),
        (sample, ["gs://nowhere/run", "--labels=1"]),
        (sample, ["{tmp}", "--labels=1", "--vae=gs://nowhere/vae"]),
        (evaluate, ["gs://nowhere/run"]),
        (encode, ["{tmp}", "{tmp}/out", "--vae=gs://nowhere/vae"]),
        (verify, ["gs://nowhere/run"]),
    ],
)
def test_a_command_logs_the_bucket_before_it_opens_it(
    refuse, storage, caplog, tmp_path, command, args
):
    random_run.save(tmp_path)
    disk._announce.cache_clear()
    caplog.set_level("INFO")
    caplog.clear()
    refuse(command, *(arg.replace("{tmp}", str(tmp_path)) for arg in args))
    assert caplog.messages[0] == "opening the bucket gs://nowhere"
