"""Small runs of dit-train in other processes: start them, wait for them, compare them."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import processes

import dit_jax
from dit_jax.checkpoint import steps, store
from dit_jax.runs import record

ROOT = Path(__file__).parents[1]
LAST = 60  # steps: two epochs and a half of 1,500 digits
EVERY = 14  # steps between two saves
SMALL = (
    "--config=configs/digits.py:Pi/4",
    "--config.train.batch_size=64",
    "--config.train.accumulation_steps=2",
    "--config.sampling.num_steps=ddim5",
    f"--config.run.total_steps={LAST}",
    "--config.run.log_every=1",
    f"--config.run.checkpoint_every={EVERY}",
    f"--config.run.sample_every={LAST}",
    "--config.run.num_samples=10",
)
SHORT_LAST = 24
SHORT = (  # for several processes and for buckets
    "--config=configs/digits.py:Pi/4",
    "--config.train.batch_size=16",
    "--config.train.decay_steps=0",
    "--config.train.warmup_steps=0",
    "--config.sampling.num_steps=ddim4",
    f"--config.run.total_steps={SHORT_LAST}",
    "--config.run.log_every=1",
    "--config.run.checkpoint_every=8",
    "--config.run.sample_every=24",
    "--config.run.num_samples=4",
)
NOISE = re.compile(r"^\[Gloo\]|jax\._src\.distributed|Grain .* profiling")  # the last two: jax 0.7


def command(workdir, *options):
    return [sys.executable, "-m", "dit_jax.cli.train", *options, f"--workdir={workdir}"]


def start(workdir, *options, config=SMALL):
    """Starts a run in one process, with one device."""
    return _popen(command(workdir, *config, *options), os.environ)


def start_pod(workdir, count, *options, devices=4):
    """Starts a SHORT run in `count` processes with `devices` devices in total."""
    address, train = processes.free_address(), command(workdir, *SHORT, *options)
    environment = processes.environment(devices // count)
    flags = [processes.flags(address, count, i) if count > 1 else [] for i in range(count)]
    return [_popen([*train, *each], environment) for each in flags]


def _popen(args, environment):
    return subprocess.Popen(args, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=environment)


def finish(process, code=0):
    """Waits until a process ends, expects its exit code, and returns its stderr."""
    (errors,) = finish_pod([process], code)
    return errors


def finish_pod(workers, code=0):
    """The same of several processes: [stderr of each], without lines of Gloo."""
    errors = [worker.communicate(timeout=300)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [code] * len(workers), errors
    lines = [[line for line in text.splitlines() if not NOISE.search(line)] for text in errors]
    return ["\n".join(kept) for kept in lines]


def kill(process):
    process.kill()
    process.communicate()


def read_until(process, text):
    """The lines that a process writes to stderr, up to the first one with this text."""
    lines = []
    for line in process.stderr:
        lines.append(line)
        if text in line:
            return "".join(lines)
    raise AssertionError(f"{text!r} did not appear: {''.join(lines)}")


def wait_for(process, happened):
    """Returns as soon as happened() is true; AssertionError if the process ends before."""
    deadline = time.monotonic() + 120
    while not happened():
        running = process.poll() is None and time.monotonic() < deadline
        assert running or happened(), process.communicate()[1]
        time.sleep(0.005)


def wait_for_step(process, workdir, step):
    """Returns as soon as the record of a run contains that step."""

    def happened():
        records = record.read(workdir / "metrics.jsonl")
        return records and records[-1]["step"] >= step

    wait_for(process, happened)


def wait_for_save(process, workdir):
    """Returns as soon as a run has saved a step."""
    wait_for(process, lambda: steps.latest(workdir / "checkpoints") is not None)


def losses(workdir):
    """{step: (loss, gradient norm)} of the record of a run."""
    return {r["step"]: (r["loss"], r["grad_norm"]) for r in record.read(workdir / "metrics.jsonl")}


def digests(workdir, step):
    """{item: {leaf: digest}} of a saved step."""
    return store.read_meta(workdir / "checkpoints", step)["digests"]


def assert_same_end(workdir, reference, last=LAST):
    """Expects bit-identical parameters, EMA and optimizer state, and the same losses throughout."""
    assert digests(workdir, last) == digests(reference, last)
    assert digests(workdir, last).keys() == {"params", "ema", "opt_state"}
    for name in ("params", "ema"):
        a, b = (read_arrays(path, name) for path in (workdir, reference))
        assert a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)
    assert losses(workdir) == losses(reference)
    assert list(losses(workdir)) == list(range(1, last + 1))


def read_arrays(workdir, name):
    """{leaf: array} of the params or the ema of a run's last step."""
    params = dit_jax.load(workdir, weights=name).params
    return {jax.tree_util.keystr(k): np.asarray(v) for k, v in jax.tree.leaves_with_path(params)}
