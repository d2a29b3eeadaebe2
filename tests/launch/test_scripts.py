import subprocess
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_whole(script):
    assert subprocess.run(["bash", "-n", script]).returncode == 0


@pytest.mark.parametrize("name", ["quickstart.sh", "test.sh"])
def test_an_old_python_is_named(tmp_path, name):
    old = tmp_path / "python3"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.8.1" && exit 0\nexit 1\n')
    old.chmod(0o755)
    done = subprocess.run(
        ["bash", LAUNCH / name], env={"PYTHON": str(old)}, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr == "PYTHON must be Python 3.11 or newer, got Python 3.8.1\n"


def test_ci_runs_what_the_readme_says():
    assert "bash launch/test.sh" in (LAUNCH.parent / ".ci" / "run").read_text()
    assert "bash launch/test.sh" in (LAUNCH.parent / "README.md").read_text()
