import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import random_run
from absl import flags

from dit_jax.cli import command, sample, train

ROOT = Path(__file__).parents[2]


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


def test_work_that_is_done_is_0_and_sees_its_flags(run):
    seen = []
    assert run(lambda values: seen.append(values.size)) == (0, "")
    assert seen == [3]


@pytest.mark.parametrize("signum", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("options, code", [("", 130), (", stopped=42", 42), (", tidies=True", 130)])
def test_a_signal_is_a_line_even_where_an_exception_would_be_lost(signum, options, code):
    script = (
        "import signal, sys\n"
        "from dit_jax.cli import command\n"
        "def main(values):\n"
        "    try:\n"
        f"        signal.raise_signal(signal.{signum})\n"
        "    except KeyboardInterrupt:\n"
        "        if tidies: raise\n"
        f"tidies = {'tidies' in options}\n"
        f"sys.exit(command.run('dit-command', lambda values: None, main{options}))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    rest = " with nothing new to save: start the same command again" if code == 42 else ""
    assert (done.returncode, done.stderr) == (code, f"dit-command: interrupted{rest}\n")


def test_a_command_leaves_the_signals_as_they_were(run):
    before = signal.getsignal(signal.SIGINT)
    assert run(lambda values: None) == (0, "")
    assert signal.getsignal(signal.SIGINT) is before


def test_a_reader_that_has_gone_is_no_fault():
    code = (
        "import sys; from dit_jax.cli import command; "
        "sys.exit(command.run('dit-command', lambda values: None, lambda values: print('text')))"
    )
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


def test_a_place_that_cannot_be_used_is_a_line(run, tmp_path):
    code, errors = run(lambda values: (tmp_path / "missing" / "file").write_text("x"))
    assert code == 2
    assert errors == (
        f"dit-command: [Errno 2] No such file or directory: '{tmp_path}/missing/file'\n"
    )


def test_a_fault_keeps_its_traceback(run):
    with pytest.raises(ValueError, match="invalid literal"):
        run(lambda values: int("x"))  # raised outside the package: not a user's mistake


def test_a_file_in_the_place_of_a_directory_is_a_line(refuse, tmp_path):
    random_run.save(tmp_path / "run")
    (tmp_path / "file").touch()
    options = (f"--checkpoint={tmp_path}/run", "--labels=3")
    line = refuse(sample, *options, f"--out={tmp_path}/file/x.png")
    assert f"out must be in a directory that exists, got {tmp_path}/file/x.png" in line


def test_a_python_file_that_is_no_config_is_refused(refuse, tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "config_config", raising=False)  # of a test before this one
    (tmp_path / "mine.py").write_text("seed = 0")
    line = refuse(train, f"--config={tmp_path}/mine.py", f"--workdir={tmp_path}/run")
    assert f"config must be a Python file with a get_config(), got {tmp_path}/mine.py" in line


@pytest.mark.parametrize(
    "lines, message",
    [
        (
            ["config = base.get_config()", "config.train.learning_rat = 1e-3"],
            "config has no field learning_rat; did you mean learning_rate?",
        ),
        (["config = base.get_config()", "config.note = 'mine'"], "config has no field note"),
        (
            ["config = base.get_config().unlock()", "del config.train.batch_size"],
            "config has no field batch_size, which configs/base.py has",
        ),
    ],
)
def test_a_config_of_ones_own_has_the_fields_of_base(refuse, tmp_path, monkeypatch, lines, message):
    monkeypatch.delitem(sys.modules, "config_config", raising=False)
    monkeypatch.syspath_prepend(ROOT)
    body = "\n    ".join(["def get_config():", *lines, "return config\n"])
    (tmp_path / "mine.py").write_text(f"from configs import base\n\n\n{body}")
    line = refuse(train, f"--config={tmp_path}/mine.py", f"--workdir={tmp_path}/run")
    assert line.endswith(message)


def test_a_config_is_found_however_it_is_written(refuse, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(ROOT))
    for config in (["--config", "~/configs/digits.py"], ["-config", f"{ROOT}/configs/digits.py"]):
        monkeypatch.setattr(sys, "path", sys.path[:])
        line = refuse(train, *config, "--config.seed=-3", f"--workdir={tmp_path}/run")
        assert "seed must be in 0 .. 4294967295, got -3" in line


def test_an_output_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=f"out must be a file, got the directory {tmp_path}"):
        command.output_path(tmp_path)
    monkeypatch.setattr(command.os, "access", lambda *_: False)  # root may write anywhere
    with pytest.raises(ValueError, match=f"out must be where you may write, got {tmp_path}/x"):
        command.output_path(tmp_path / "x")
