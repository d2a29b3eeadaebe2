import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import random_run
from absl import flags

from dit_jax.cli import command, sample, train
from dit_jax.diffusion import ddpm, samplers, schedules
from dit_jax.errors import UserError

ROOT = Path(__file__).parents[2]
LEVELS = ddpm.DDPM(schedules.linear()).levels("4")


@pytest.fixture
def run(monkeypatch, capsys):
    """run(main) -> exit code and stderr of a command whose work is main(values)."""

    def call(main):
        monkeypatch.setattr(sys, "argv", ["command", "--size=3"])
        code = command.run("dit-command", define, main, required=["size"])
        return code, capsys.readouterr().err

    return call


def define(values):
    flags.DEFINE_integer("size", None, "Of nothing.", flag_values=values)


def test_finished_work_exits_with_0_and_gets_its_flags(run):
    seen = []
    assert run(lambda values: seen.append(values.size)) == (0, "")
    assert seen == [3]


INTERRUPTED = """
import signal, sys, time
from dit_jax.cli import command, interrupt

class Destroyed:
    def __del__(self):  # Python ignores what it raises
        signal.raise_signal(signal.{signum})

def main(values):
    if {tidies}:
        interrupt.raise_from_here()
    del [Destroyed()][0]
    time.sleep(20)

sys.exit(command.run('dit-command', lambda values: None, main{options}))
"""


@pytest.mark.parametrize("signum", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize(
    "tidies, options, code", [(0, "", 130), (0, ", stopped=42", 42), (1, "", 130)]
)
def test_a_signal_is_one_line_even_where_an_exception_is_lost(signum, tidies, options, code):
    script = INTERRUPTED.format(signum=signum, tidies=tidies, options=options)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    rest = " with nothing new to save: start the same command again" if code == 42 else ""
    assert (done.returncode, done.stderr) == (code, f"dit-command: interrupted{rest}\n")


CLEANED = """
import signal, sys
from dit_jax.cli import command, interrupt

def clean():
    print('cleaned')
    signal.raise_signal(signal.SIGINT)  # a second Ctrl-C must not end the first one's work
    print('wholly')

def main(values):
    interrupt.clean_at_the_end(clean)
    print('before')
    signal.raise_signal(signal.SIGINT)

sys.exit(command.run('dit-command', lambda values: None, main))
"""


def test_a_signal_flushes_the_output_and_cleans_up():
    done = subprocess.run([sys.executable, "-c", CLEANED], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "dit-command: interrupted\n")
    assert done.stdout.split() == ["before", "cleaned", "wholly"]


def test_a_command_restores_the_signal_handlers(run):
    before = signal.getsignal(signal.SIGINT)
    assert run(lambda values: None) == (0, "")
    assert signal.getsignal(signal.SIGINT) is before


def test_a_closed_pipe_exits_with_141():
    code = (
        "import sys; from dit_jax.cli import command; "
        "sys.exit(command.run('dit-command', lambda values: None, lambda values: print('text')))"
    )
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


def test_an_os_error_is_one_line(run, tmp_path):
    code, errors = run(lambda values: (tmp_path / "missing" / "file").write_text("x"))
    assert code == 2
    assert errors == (
        f"dit-command: [Errno 2] No such file or directory: '{tmp_path}/missing/file'\n"
    )


@pytest.mark.parametrize(
    "words, named",
    [
        (["--size=3", "--where=gs://none/run"], "where gs://none/run"),
        (["--size=3", "gs://none/run"], "gs://none/run"),
    ],
)
def test_a_bucket_that_does_not_answer_is_named(monkeypatch, capsys, words, named):
    def define_both(values):
        define(values)
        flags.DEFINE_string("where", None, "Of it.", flag_values=values)

    class ClientError(OSError):
        __module__ = "aiohttp.client_exceptions"

    def main(values, *found):
        raise ClientError("Cannot connect to host")

    monkeypatch.setattr(sys, "argv", ["command", *words])
    assert command.run("dit-command", define_both, main, takes=None) == 2
    line = f"dit-command: {named} must be in a bucket that answers: Cannot connect to host\n"
    assert capsys.readouterr().err == line


def test_a_user_error_is_one_line(run):
    def main(values):
        raise UserError("size must be small, got 3")

    assert run(main) == (2, "dit-command: size must be small, got 3\n")


def test_a_lack_of_memory_is_one_line(run):
    def main(values):
        return np.empty(2**60, np.uint8)

    code, errors = run(main)
    assert code == 2
    assert errors.startswith("dit-command: this needs more memory than this host has: Unable to ")


def test_any_other_value_error_keeps_its_traceback(run):
    with pytest.raises(ValueError, match="noise_at must be given"):  # a programmer's mistake
        run(lambda values: samplers.run(samplers.ddpm(LEVELS), None, None))


@pytest.mark.slow
def test_a_field_that_a_config_removed_has_its_default(call, tmp_path, monkeypatch):
    lines = ["config = digits.get_config('Pi/4').unlock()", "del config.sampling.eta"]
    body = "\n    ".join(["def get_config():", *lines, "return config\n"])
    (tmp_path / "mine.py").write_text(f"from configs import digits\n\n\n{body}")
    options = ("--config.run.total_steps=1", "--config.train.decay_steps=0")
    options += ("--config.train.warmup_steps=0", "--config.train.batch_size=8")
    options += ("--config.run.num_samples=8", "--config.sampling.num_steps=2")
    monkeypatch.delitem(sys.modules, "config_config", raising=False)  # of a test before this one
    with jax.numpy_dtype_promotion("standard"):  # optax's Adam mixes dtypes
        code, _, errors = call(
            train, f"--config={tmp_path}/mine.py", f"--workdir={tmp_path}/run", *options
        )
    assert code == 0, errors
    assert json.loads((tmp_path / "run" / "config.json").read_text())["sampling"]["eta"] == 0.0


def test_a_file_instead_of_a_directory_is_one_line(refuse, tmp_path):
    random_run.save(tmp_path / "run")
    (tmp_path / "file").touch()
    options = (f"--checkpoint={tmp_path}/run", "--labels=3")
    line = refuse(sample, *options, f"--out={tmp_path}/file/x.png")
    assert f"out must be in a directory that exists, got {tmp_path}/file/x.png" in line


def test_a_python_file_without_get_config_is_refused(refuse, tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "config_config", raising=False)  # of a test before this one
    (tmp_path / "mine.py").write_text("seed = 0")
    line = refuse(train, f"--config={tmp_path}/mine.py", f"--workdir={tmp_path}/run")
    assert f"config must be a Python file with a get_config(), got {tmp_path}/mine.py" in line


@pytest.mark.parametrize(
    "lines, message",
    [
        (
            ["config = base.get_config()", "config.train.learning_rat = 1e-3"],
            "config has no field learning_rat; did you mean train.learning_rate?",
        ),
        (["config = base.get_config()", "config.note = 'mine'"], "config has no field note"),
    ],
)
def test_a_config_with_an_unknown_field_is_refused(refuse, tmp_path, monkeypatch, lines, message):
    monkeypatch.delitem(sys.modules, "config_config", raising=False)
    monkeypatch.syspath_prepend(ROOT)
    body = "\n    ".join(["def get_config():", *lines, "return config\n"])
    (tmp_path / "mine.py").write_text(f"from configs import base\n\n\n{body}")
    line = refuse(train, f"--config={tmp_path}/mine.py", f"--workdir={tmp_path}/run")
    assert line.endswith(message)


def test_a_config_may_be_a_separate_word_or_start_with_a_tilde(refuse, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(ROOT))
    for config in (["--config", "~/configs/digits.py"], ["-config", f"{ROOT}/configs/digits.py"]):
        monkeypatch.setattr(sys, "path", sys.path[:])
        line = refuse(train, *config, "--config.seed=-3", f"--workdir={tmp_path}/run")
        assert "seed must be in 0 .. 4294967295, got -3" in line


def test_an_unwritable_output_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=f"out must be a file, got the directory {tmp_path}"):
        command.output_path(tmp_path)
    (tmp_path / "x").touch()
    monkeypatch.setattr(command.os, "access", lambda *_: False)  # root may write anywhere
    with pytest.raises(ValueError, match=f"out must be where you may write, got {tmp_path}/x"):
        command.output_path(tmp_path / "x")


@pytest.mark.parametrize("check", [command.output_path, command.output_folder])
@pytest.mark.parametrize(
    "path, reason",
    [("/proc/x.png", "No such file or directory"), ("x" * 300, "File name too long")],
)
def test_an_output_that_cannot_be_made_is_named(check, path, reason):
    with pytest.raises(UserError, match=f"(?i)^out must be where you may write, got .*: {reason}$"):
        check(path)


def test_a_check_of_an_output_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert command.output_folder(".") == Path(".")
    command.output_path(tmp_path / "x.png")
    command.output_folder(tmp_path / "new" / "folder")
    assert not list(tmp_path.iterdir())
    assert command.output_folder("/proc/x", writes=False) == Path("/proc/x")
