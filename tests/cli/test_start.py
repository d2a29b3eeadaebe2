"""How commands start: --help and a wrong flag are answered before anything large is imported."""

import glob
import os
import re
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import small_run

from dit_jax import settings
from dit_jax.cli import encode
from dit_jax.data import latents
from dit_jax.diffusion import samplers

ROOT = Path(__file__).parents[2]
CLI = ROOT / "dit_jax" / "cli"
COMMANDS = sorted(path.stem for path in CLI.glob("*.py") if "def entry" in path.read_text())
LARGE = {"jax", "numpy", "flax", "optax", "orbax", "grain", "torch", "sklearn", "scipy", "PIL"}


def start(name, *words):
    """(exit code, stdout, stderr, seconds of CPU) of a command in another process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", f"dit_jax.cli.{name}", *words], capture_output=True, text=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return done.returncode, done.stdout, done.stderr, seconds


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_imports_its_work_after_the_flags(name):
    code = f"import sys, dit_jax.cli.{name}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not LARGE & {module.split(".")[0] for module in done.stdout.split()}


@pytest.mark.parametrize("name", COMMANDS)
def test_help_and_a_typo_are_answered_within_a_second(name):
    code, out, errors, seconds = start(name, "--help")
    assert (code, errors) == (0, "") and "dit-" in out
    assert seconds < 1
    code, out, errors, seconds = start(name, "--no_such_flag=1")
    assert (code, out) == (2, "") and errors.startswith(f"dit-{name}: Unknown command line flag")
    assert seconds < 1


def test_names_that_flags_offer_are_those_of_the_work():
    assert settings.SAMPLERS == tuple(samplers.SAMPLERS)
    assert encode.DTYPES == latents.DTYPES


def interrupt(name, workdir, *, after, signum=signal.SIGINT, delay=0.0):
    """(exit code, stderr) of a command that gets a signal after the import of this module."""
    words = [word.replace("{new}", str(workdir)) for word in WORDS[name]]
    command = [sys.executable, "-X", "importtime", "-m", f"dit_jax.cli.{name}", *words]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        kept, timer = [], threading.Timer(delay, process.send_signal, [signum])
        for line in process.stderr:
            if not line.startswith("import time:"):
                kept.append(line)
            elif line.split("|")[-1].strip() == after:
                timer.start()
        timer.cancel()
    return process.returncode, "".join(kept)


CONFIG = ["configs/digits.py:Ti/4", "--config.mesh.fsdp=3"]
ABSENT = "rocm" if glob.glob("/dev/accel*") else "tpu"  # devices that this machine lacks


@pytest.mark.parametrize(
    "variables, message",
    [
        ({"JAX_PLATFORMS": ABSENT}, "JAX_PLATFORMS must name devices that this machine has, and "),
        ({"JAX_PLATFORMS": "gpu"}, "JAX_PLATFORMS must name devices that this machine has, and "),
        ({"XLA_FLAGS": "--xla_none=1"}, "XLA_FLAGS must be flags that this XLA knows, got '--xla_"),
        ({}, "mesh must be of "),  # libtpu, which is installed, prints nothing
    ],
)
def test_an_environment_that_jax_cannot_use_is_one_line(tmp_path, variables, message):
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_", "TPU_"))}
    kept |= {"TF_CPP_MIN_LOG_LEVEL": "1", "CUDA_VISIBLE_DEVICES": ""} | variables
    command = [sys.executable, "-m", "dit_jax.cli.train", *CONFIG, tmp_path / "new"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=kept)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = (line for line in done.stderr.splitlines() if not small_run.NOISE.search(line))
    assert line.startswith(f"dit-train: {message}")
    assert not (tmp_path / "new").exists()


WORDS = {
    "train": ["configs/digits.py:Ti/4", "{new}", "--config.train.batch_size=16"],
    "sample": ["{new}", "--labels=1"],
    "convert": ["inspect", "{new}"],
    "bench": ["data", "configs/digits.py"],
}


@pytest.mark.parametrize(
    "name, after, signum",
    [
        ("train", "dit_jax.cli", signal.SIGINT),
        ("train", "dit_jax.cli", signal.SIGTERM),
        ("bench", "absl.flags", signal.SIGINT),
        ("sample", "dit_jax.cli.command", signal.SIGINT),
        ("train", "numpy", signal.SIGINT),
        ("convert", "jax._src.api", signal.SIGINT),
        ("train", "orbax.checkpoint", signal.SIGTERM),
    ],
)
def test_a_signal_during_an_import_is_one_line(tmp_path, name, after, signum):
    code, errors = interrupt(name, tmp_path / "new", after=after, signum=signum)
    assert_interrupted(name, code, errors)


def assert_interrupted(name, code, errors):
    rest = " with nothing new to save: start the same command again" if name == "train" else ""
    assert errors == f"dit-{name}: interrupted{rest}\n"
    assert code == (42 if name == "train" else 130)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(WORDS))
def test_ctrl_c_at_any_moment_is_one_line(tmp_path, name):
    for i in range(24):
        workdir = tmp_path / str(i)
        code, errors = interrupt(name, workdir, after="dit_jax.cli", delay=0.25 * i)
        assert "Traceback" not in errors and "Exception ignored" not in errors, (i, errors)
        if code in (42, 130):
            last = errors.splitlines()[-1]
            assert re.search("interrupted|stopped after step .* is saved", last), (i, errors)
        else:  # it had ended before
            assert code in (0, 2), (i, errors)
