import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "launch"
# All that the scripts and the stand-ins may call: any fresh Linux machine with git has these.
TOOLS = (
    *("basename", "bash", "cat", "cksum", "cp", "date", "dirname", "env", "head"),
    *("mkdir", "mktemp", "mv", "nohup", "realpath", "rm", "sh", "sleep", "sort", "tail"),
    *("git", "grep", "gzip", "sed", "tar", "touch", "wc"),
)
# `-m venv` makes .venv with programs that write down their calls, as this one does.
PYTHON = r"""
echo "${NNX_GRAPH_MODE:+NNX_GRAPH_MODE=$NNX_GRAPH_MODE }${0##*/} $*" >> "$FAKE/calls"
if [ "$*" = "-m venv .venv" ]; then
  mkdir -p .venv/bin
  for name in python ruff dit-train dit-sample dit-evaluate; do cp "$0" ".venv/bin/$name"; done
fi
"""


@pytest.fixture
def put(tmp_path):
    """put(name, text): writes a program of that name to the PATH of `run`."""
    (tmp_path / "bin").mkdir()

    def write(name, text):
        path = tmp_path / "bin" / name
        path.write_text("#!/usr/bin/env bash\n" + text)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    return write


@pytest.fixture
def put_python(put):
    """put_python(more): a python3 that installs nothing; more: what its programs do too."""
    return lambda more="": put("python3", PYTHON + more)


@pytest.fixture
def clone(put_python, tmp_path):
    """A clone with nothing but launch/ and setup.py, and the python3 of `put_python`."""
    put_python()
    shutil.copytree(LAUNCH, tmp_path / "clone" / "launch")
    shutil.copy(LAUNCH.parent / "setup.py", tmp_path / "clone")
    return tmp_path / "clone"


@pytest.fixture
def environment(tmp_path):
    """Environment variables of a fresh machine: its PATH has the programs of `put`, then TOOLS."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in TOOLS:
        (tools / name).symlink_to(shutil.which(name))
    return {"PATH": f"{tmp_path / 'bin'}:{tools}", "HOME": str(tmp_path), "FAKE": str(tmp_path)}


@pytest.fixture
def run(environment, tmp_path):
    """run(script, *words, **settings): runs a script of launch/ and returns the ended process."""

    def call(script, *words, **settings):
        return subprocess.run(
            ["bash", LAUNCH / script, *words],
            env={**environment, "TMPDIR": str(tmp_path), **settings},
            cwd=LAUNCH.parent,
            capture_output=True,
            text=True,
            timeout=60,
        )

    return call


@pytest.fixture
def check_golden(tmp_path):
    """check_golden(name, text): compares with tests/testdata/launch/name; REGOLD=1 rewrites it."""
    folder = Path(__file__).parents[1] / "testdata" / "launch"
    head = ["git", "-C", LAUNCH, "rev-parse", "HEAD"]
    commit = subprocess.run(head, capture_output=True, text=True, check=True).stdout.strip()
    names = {str(tmp_path): "TMPDIR", commit: "COMMIT", str(LAUNCH.parent): "CLONE"}

    def check(name, text):
        for value, word in names.items():
            text = text.replace(value, word)
        if os.environ.get("REGOLD"):
            (folder / name).write_text(text)
        assert text == (folder / name).read_text()

    return check
