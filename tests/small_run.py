"""A small run of dit-train in a process of its own, and how to compare two of them."""

import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np

import dit_jax
from dit_jax.checkpoint import store
from dit_jax.runs import record

ROOT = Path(__file__).parents[1]
LAST = 60  # steps: two epochs and a half of 1,500 digits
SMALL = (
    "--config=configs/digits.py:Ti/4",
    "--config.train.batch_size=64",
    "--config.train.accumulation_steps=2",
    "--config.sampling.num_steps=ddim5",
    f"--config.run.total_steps={LAST}",
    "--config.run.log_every=1",
    "--config.run.checkpoint_every=8",
    "--config.run.sample_every=25",
    "--config.run.num_samples=10",
)


def start(workdir, *options):
    command = [sys.executable, "-m", "dit_jax.cli.train", *SMALL, f"--workdir={workdir}", *options]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=os.environ)


def finish(process, code=0):
    _, errors = process.communicate(timeout=300)
    assert process.returncode == code, errors
    return errors


def read_until(process, text):
    """The lines that a process says on stderr up to one with this text."""
    lines = []
    for line in process.stderr:
        lines.append(line)
        if text in line:
            return "".join(lines)
    raise AssertionError(f"{text!r} was not said: {''.join(lines)}")


def wait_for_step(process, workdir, step):
    """Returns as soon as the record holds that step."""
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        records = record.read(workdir / "metrics.jsonl")
        if records and records[-1]["step"] >= step:
            return
        time.sleep(0.005)
    raise AssertionError(f"step {step} did not come: {process.communicate()[1]}")


def losses(workdir):
    return {r["step"]: (r["loss"], r["grad_norm"]) for r in record.read(workdir / "metrics.jsonl")}


def assert_same_end(workdir, reference):
    """Parameters, average and optimizer state are bit-identical, and so was the whole way."""
    metas = [store.read_meta(path / "checkpoints", LAST) for path in (workdir, reference)]
    assert metas[0]["digests"] == metas[1]["digests"]
    assert metas[0]["digests"].keys() == {"params", "ema", "opt_state"}
    for name in ("params", "ema"):
        a, b = (train_state(path, name) for path in (workdir, reference))
        assert a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)
    assert losses(workdir) == losses(reference)
    assert list(losses(workdir)) == list(range(1, LAST + 1))


def train_state(workdir, name):
    """{path: array} of an item, read back from the disk and checked against its digests."""
    params = dit_jax.load(workdir, weights=name).params
    return {jax.tree_util.keystr(k): np.asarray(v) for k, v in jax.tree.leaves_with_path(params)}
