"""Runs whose workdir lies in a bucket: killed, stopped, gone on with, sampled from, refused."""

import io
import itertools
import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import processes
import pytest
import random_run
from PIL import Image

from dit_jax.checkpoint import steps, store
from dit_jax.cli import convert, evaluate, prepare, sample, train
from dit_jax.machine import disk
from dit_jax.runs import record
from dit_jax.sampling import trained

ROOT = Path(__file__).parents[2]
LAST = 24
SMALL = (
    "--config=configs/digits.py:Ti/4",
    "--config.train.batch_size=16",
    "--config.sampling.num_steps=ddim5",
    f"--config.run.total_steps={LAST}",
    "--config.run.log_every=1",
    "--config.run.checkpoint_every=8",
    "--config.run.sample_every=24",
    "--config.run.num_samples=10",
)


def start(workdir, count=1):
    """The processes of a run."""
    command = [sys.executable, "-m", "dit_jax.cli.train", *SMALL, f"--workdir={workdir}"]
    address = processes.free_address()
    return [
        subprocess.Popen(
            [*command, *(processes.flags(address, count, i) if count > 1 else [])],
            cwd=ROOT,
            env=processes.environment() if count > 1 else None,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(count)
    ]


def finish(workers, code=0):
    """What process 0 said."""
    errors = [worker.communicate(timeout=280)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [code] * len(workers), errors
    return errors[0]


def kill_at(storage, workers, name):
    """Kills the processes as they begin to write an object of this name; it is not written."""

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
    """Has a process be stopped as it writes so many lines of the record."""
    writes = itertools.count()  # the first one drops lines, and adds none

    def may_write(written):
        if written.endswith("metrics.jsonl") and next(writes) == lines:
            worker.send_signal(signal.SIGTERM)
        return True

    storage.allow(write=may_write)


def damage(storage, path):
    key = ("tests", str(path).removeprefix("gs://tests/"))
    storage.objects[key] = storage.objects[key]._replace(content=b"")


def assert_same_end(workdir, reference):
    """Parameters, average, optimizer state and losses of both runs are bit-identical."""
    metas = [store.read_meta(path / "checkpoints", LAST) for path in (workdir, reference)]
    assert metas[0]["digests"] == metas[1]["digests"]
    assert metas[0]["digests"].keys() == {"params", "ema", "opt_state"}
    lines = [record.read(path / "metrics.jsonl") for path in (workdir, reference)]
    a, b = ([(x["step"], x["loss"], x["grad_norm"]) for x in each] for each in lines)
    assert a == b and [step for step, *_ in a] == list(range(1, LAST + 1))


def test_a_run_in_a_bucket_is_killed_and_stopped_and_ends_as_one_on_a_disk(
    storage, bucket_path, tmp_path
):
    finish(start(tmp_path / "run"))
    workers = start(bucket_path)
    kill_at(storage, workers, "checkpoints/16/commit_success.txt")
    assert steps.latest(bucket_path / "checkpoints") == 8
    assert disk.exists(bucket_path / "checkpoints" / "16" / "_CHECKPOINT_METADATA")
    workers = start(bucket_path)
    stop_at(storage, workers[0], 10)  # in the step after 18, as 16 is on its way to the bucket
    errors = finish(workers, code=42)
    assert "going on from step 8 of gs://" in errors
    stopped = steps.latest(bucket_path / "checkpoints")
    assert f"stopped after step {stopped}, which is saved" in errors and stopped > 16
    damage(storage, bucket_path / "checkpoints" / str(stopped) / "params" / "manifest.ocdbt")
    errors = finish(start(bucket_path))
    assert f"set aside in {bucket_path}/damaged/{stopped}, going on from an older one" in errors
    assert "going on from step 16" in errors
    assert_same_end(bucket_path, tmp_path / "run")
    assert json.loads((bucket_path / "config.json").read_text())["model"]["size"] == "Ti"
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {path.name for path in bucket_path.iterdir()} == names | {"damaged"}
    for name in ("loss.png", "samples/0000024.png"):
        ours, theirs = ((place / name).read_bytes() for place in (bucket_path, tmp_path / "run"))
        with Image.open(io.BytesIO(ours)) as one, Image.open(io.BytesIO(theirs)) as other:
            assert one.size == other.size
            assert name == "loss.png" or np.array_equal(one, other)


@pytest.mark.slow
def test_two_processes_of_a_run_in_a_bucket(storage, bucket_path, tmp_path):
    finish(start(tmp_path / "run", 2))
    workers = start(bucket_path, 2)
    kill_at(storage, workers, "checkpoints/16/commit_success.txt")
    workers = start(bucket_path, 2)
    stop_at(storage, workers[1], 10)
    assert "going on from step 8 of gs://" in finish(workers, code=42)
    finish(start(bucket_path, 2))
    assert_same_end(bucket_path, tmp_path / "run")


def test_samples_and_judgments_are_drawn_from_a_bucket(call, bucket_path, tmp_path, monkeypatch):
    for place in (bucket_path, tmp_path / "run"):
        random_run.save(place)
        out = f"--out={tmp_path}/{place.name}.npz"
        assert call(sample, f"--checkpoint={place}", "--labels=3,1,4", out)[0] == 0
    ours, theirs = (np.load(tmp_path / f"{name}.npz") for name in (bucket_path.name, "run"))
    np.testing.assert_array_equal(ours["arr_0"], theirs["arr_0"])
    blank = np.zeros((2500, 8, 8, 1), np.uint8)
    monkeypatch.setattr(trained.LoadedDiT, "sample", lambda self, labels, **_: blank[: len(labels)])
    assert call(evaluate, f"--checkpoint={bucket_path}")[0] == 0
    assert json.loads((bucket_path / "judgments.json").read_text())["step"] == 30


@pytest.mark.parametrize(
    "command, args, message",
    [
        (train, [*SMALL, "--workdir=gs://nowhere/run"], "workdir must be in a bucket that exists"),
        (
            train,
            [*SMALL, "--workdir=s3://tests/run"],
            "on a disk or start with gs://BUCKET, got s3",
        ),
        (
            train,
            ["--config=configs/imagenet256.py", "--config.data.path=gs://tests/data"],
            "data.path must be on a disk, got gs://tests/data: mount the bucket",
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
def test_what_a_bucket_cannot_be_is_one_line(refuse, storage, command, args, message, tmp_path):
    if command is train and not args[-1].startswith("--workdir"):
        args = [*args, f"--workdir={tmp_path}/run"]
    assert message in refuse(command, *args)
