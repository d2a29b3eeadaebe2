"""Commands called in this process, from the repository's root."""

import sys
from pathlib import Path

import pytest
import small_run

ROOT = Path(__file__).parents[2]


@pytest.fixture
def call(monkeypatch, capsys):
    """call(command module, *flags) -> its exit code, stdout and stderr."""

    def run(module, *args):
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", ["command", *map(str, args)])
        with pytest.raises(SystemExit) as stopped:
            module.entry()
        return stopped.value.code or 0, *capsys.readouterr()

    return run


@pytest.fixture
def refuse(call):
    """refuse(command module, *flags) -> the one line with which it refuses, exit code 2."""

    def run(module, *args):
        code, _, errors = call(module, *args)
        assert code == 2
        (line,) = errors.splitlines()
        assert line.startswith(f"dit-{module.__name__.split('.')[-1]}: ")
        return line

    return run


@pytest.fixture(scope="session")
def reference(tmp_path_factory):
    """A small run that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("runs") / "reference"
    small_run.finish(small_run.start(workdir))
    return workdir
