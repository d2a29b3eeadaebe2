import os
import stat
import subprocess
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "launch"


@pytest.fixture
def put(tmp_path):
    """put(name, text): a program of that name on the PATH of `run`."""
    (tmp_path / "bin").mkdir()

    def write(name, text):
        path = tmp_path / "bin" / name
        path.write_text("#!/usr/bin/env bash\n" + text)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    return write


@pytest.fixture
def environment(tmp_path):
    """Nothing of the caller's but the system's programs, behind those of `put`."""
    return {
        "PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin",
        "HOME": str(tmp_path),
        "FAKE": str(tmp_path),
    }


@pytest.fixture
def run(environment, tmp_path):
    """run(script, *words, **settings): a script of launch/, to its end."""

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
    """check_golden(name, text): as tests/testdata/launch/name; REGOLD=1 writes it instead."""
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
