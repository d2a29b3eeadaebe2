import json
import os
import subprocess
import sys

import jax
import pytest

from dit_jax.cli import plan
from dit_jax.planning import plan as planning
from dit_jax.runs import plans

REMAT = ("none", "dots", "full")
MESHES = [{"data": 4, "fsdp": 1, "tensor": 1}, {"data": 2, "fsdp": 1, "tensor": 2}]
SMALL = ("--config=configs/digits.py:Ti/2", "--topology=v5e:2x2")


@pytest.fixture(autouse=True, scope="module")
def compilation_cache_in_this_process():
    """None: jax 0.7 cannot write programs for TPUs to a cache, and warns."""


@pytest.fixture
def standard():
    with jax.numpy_dtype_promotion("standard"):  # optax's Adam mixes types
        yield


def test_the_command_prints_and_writes_only_its_plan(tmp_path):
    out = tmp_path / "plan.json"
    command = [sys.executable, "-m", "dit_jax.cli.plan", *SMALL]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "TPU_"))}
    done = subprocess.run(
        [*command, "--config.mesh.fsdp=2", f"--out={out}"],
        **{"capture_output": True, "text": True, "env": environment, "timeout": 120},
    )
    assert done.returncode == 0 and done.stderr == ""
    printed = done.stdout
    figures = json.loads(out.read_text())
    assert figures["mesh"] == {"data": 2, "fsdp": 2, "tensor": 1}
    assert figures["fits"] and figures["advice"] == [] and figures["devices"] == 4
    assert figures["estimated_seconds"]["arithmetic"] > 0 and figures["collectives"]
    assert "4 x TPU v5 lite (v5e:2x2)" in printed and "all-gather" in printed
    assert "estimates, not measurements" in printed and "memory per device" in printed


@pytest.mark.slow
def test_a_sweep_ranks_what_it_tries(call, tmp_path, standard, monkeypatch):
    asked, out = [], tmp_path / "plan.json"
    monkeypatch.setattr(planning, "meshes", lambda count, **o: asked.append(o) or MESHES)
    options = ("--config.train.batch_size=32", "--config.train.accumulation_steps=8")
    options += ("--config.compute.dtype=bfloat16", f"--out={out}")
    code, printed, _ = call(plan, *SMALL, "--sweep", *options)
    assert code == 0
    assert asked == [{"heads": 4, "width": 512, "batch_size": 4}]  # the examples of one pass
    rows = json.loads(out.read_text())
    tried = [(row["mesh"]["data"], row["remat"]) for row in rows]
    assert len(tried) == 4 and len(set(tried)) == 4  # both meshes, the better with all policies
    assert {remat for data, remat in tried if data == rows[0]["mesh"]["data"]} == set(REMAT)
    times = [row["estimated_seconds"]["with_overlap"] for row in rows]
    assert times == sorted(times)
    assert f"The best: {plans.as_flags(rows[0])}" in printed


@pytest.mark.parametrize(
    "args, message",
    [
        (["--topology=v3:2x2"], "--config must be given"),
        (["--config=configs/digits.py"], "--topology must be given"),
        (
            ["--config=configs/digits.py", "--topology=v9:4"],
            "topology must be a generation and the chips along each side, as v2:2x2, ",
        ),
        ([*SMALL, "--config.mesh.fsdp=3"], "mesh must be of 4 devices, got data"),
        (
            [*SMALL, "--config.mesh.data=1", "--config.mesh.fsdp=2", "--config.mesh.tensor=4"],
            "mesh must be of 4 devices, got data 1 x fsdp 2 x tensor 4",
        ),
        (
            ["--config=configs/imagenet256.py:S/2", "--topology=v5e:2x2"]
            + ["--config.mesh.tensor=4"],
            "mesh.tensor must divide the 6 heads of S, got 4",
        ),
        (
            [*SMALL, "--config.train.batch_size=2"],
            "train.batch_size must be divisible by 4 (mesh.data x mesh.fsdp)",
        ),
        (
            [*SMALL[:1], "--topology=v3:8x16", "--config.train.batch_size=4", "--sweep"],
            "train.batch_size must be divisible by 256 (mesh.data x mesh.fsdp)",
        ),
        ([*SMALL, "--out=no/where"], "out must be in a directory"),
        ([*SMALL, "--out=README.md"], "out must end with .json, got README.md"),
        ([*SMALL, "--config.compute.remat=some"], "remat must be one of none, dots, full"),
    ],
)
def test_wrong_use_is_one_line(refuse, args, message):
    assert message in refuse(plan, *args)


def test_a_missing_libtpu_is_one_line(refuse, monkeypatch):
    monkeypatch.setattr(planning.importlib.util, "find_spec", lambda name: None)
    assert "pip install -e .[tpu]" in refuse(plan, *SMALL)
