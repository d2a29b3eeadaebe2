"""The time of a start: `dit-bench start`."""

import json
import subprocess
import sys
import time

import pytest

from configs import digits
from dit_jax import settings as settings_lib
from dit_jax.cli import bench
from dit_jax.errors import UserError
from dit_jax.runs import build, startup

SMALL = {"train.batch_size": 8}


def read(changes=SMALL):
    return settings_lib.replace(build.read(digits.get_config("Pi/4")), changes)


def test_phases_are_timed_one_after_the_other():
    clock = startup.Clock(time.time() - 1)
    clock.end("imports")
    time.sleep(0.02)
    clock.end("devices")
    assert 1 <= clock.seconds["imports"] < 1.5 and 0.02 <= clock.seconds["devices"] < 0.5


def test_a_cold_and_a_warm_start_share_a_folder(monkeypatch):
    folders = []

    def start(settings, cache):
        folders.append(cache)
        return {name: 4.0 / len(folders) for name in startup.PHASES}

    monkeypatch.setattr(startup, "start", start)
    figures = startup.measure(read())
    assert folders[0] == folders[1] and len(figures) == 14
    assert figures["cold_total_seconds"] == 24 and figures["warm_total_seconds"] == 12
    assert figures["cold_compiling_seconds"] == 4 and figures["warm_compiling_seconds"] == 2


def test_the_parent_imports_no_jax():
    code = "import sys, dit_jax.runs.startup; print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.slow
def test_real_starts_are_measured(tmp_path, call):
    out = tmp_path / "start.json"
    words = ("configs/digits.py:Pi/4", "--config.train.batch_size=8", f"--out={out}")
    code, printed, errors = call(bench, "start", *words)
    assert code == 0, errors
    figures = json.loads(out.read_text())
    assert all(name in printed for name in figures)
    for kind in ("cold", "warm"):
        phases = [figures[f"{kind}_{name}_seconds"] for name in startup.PHASES]
        assert min(phases) > 0
        assert figures[f"{kind}_total_seconds"] == pytest.approx(sum(phases))
    assert figures["warm_compiling_seconds"] < figures["cold_compiling_seconds"]


@pytest.mark.slow
def test_a_start_that_fails_says_why_in_a_line(tmp_path):
    with pytest.raises(UserError, match="^train.batch_size must be divisible by 1 ") as raised:
        startup.start(read({"train.batch_size": 8, "train.accumulation_steps": 3}), tmp_path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("flag", ["peer", "repeats=3", "warmup=1"])
def test_flags_that_a_start_does_not_have_are_refused(call, flag):
    code, _, errors = call(bench, "start", "configs/digits.py", f"--{flag}")
    name = flag.partition("=")[0]
    assert code == 2 and f"{name} must be left out for start, got " in errors


def test_a_sweep_of_starts_is_refused(call):
    code, _, errors = call(bench, "start", "configs/digits.py", "--sweep")
    assert code == 2 and "sweep must be false for start" in errors
