import json

import jax
import pytest

from dit_jax import settings as settings_lib
from dit_jax.cli import bench
from dit_jax.errors import UserError
from dit_jax.machine import devices
from dit_jax.planning import plan
from dit_jax.runs import bench as work
from dit_jax.runs import tuning

SMALL = ("configs/digits.py:Pi/4", "--config.train.batch_size=8", "--repeats=2", "--warmup=1")
SPEED = {"none": 0.25, "dots": 0.5, "full": 1.0}  # seconds of a step of 8


def fake_train(settings):
    """A step whose time the test knows; 16 examples do not fit without remat."""
    compute, size = settings.compute, settings.train.batch_size
    if size > 8 and compute.remat == "none":
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 3 GB")
    seconds = (
        SPEED[compute.remat] * (1 + size / 8) / 2 * (0.5 if compute.attention == "cudnn" else 1)
    )
    return work.Work(lambda: seconds, 8e12, 0.1, 1, 2_000_000_000)


@pytest.fixture
def faked(monkeypatch):
    monkeypatch.setattr(work, "prepare_train", fake_train)
    monkeypatch.setattr(
        work, "time_in_turn", lambda runs, *_: ({k: [run()] * 3 for k, run in runs.items()}, {})
    )


def sweep(capsys, *sizes, **changes):
    settings = settings_lib.replace(settings_lib.Settings(), {"train.batch_size": 8} | changes)
    return tuning.sweep(settings, sizes, repeats=2, warmup=1), capsys.readouterr().out


def test_cases_are_ranked_and_failures_are_rows(faked, capsys):
    figures, printed = sweep(capsys)
    rows = figures["rows"]
    tried = [(x["train.batch_size"], x["compute.remat"], x["compute.unroll"]) for x in rows]
    assert len(tried) == len(set(tried)) == 10  # 3 sizes x 3 policies, and the best unrolled
    rates = [x["images_per_second"] for x in rows if "failed" not in x]
    assert len(rates) == 9 and rates == sorted(rates, reverse=True) and rates[0] == 32
    assert rows[0]["needed_memory_gb"] == 2 and rows[0]["compile_seconds"] == 0.1
    assert "train.batch_size, raise" in rows[-1]["failed"] and tried[-1] == (16, "none", False)
    assert printed.count("   16    none      no        xla  fails: a step must fit into") == 2
    flags = "--config.train.batch_size=8 --config.compute.remat=none --config.compute.unroll=False"
    assert figures["best"] == figures["best_of_all"] == f"{flags} --config.compute.attention=xla"
    assert printed.endswith(f"The best at batch size 8: {figures['best']}\n")


def test_both_attentions_of_a_gpu_are_tried_on_the_fastest_cases(faked, capsys, monkeypatch):
    monkeypatch.setattr(devices, "attentions", lambda *_, **__: ("cudnn", "xla"))
    figures, printed = sweep(capsys, 4, 16, **{"compute.attention": "xla"})
    assert figures["rows"][0]["compute.attention"] == "cudnn"
    assert figures["best"] is None and "The best at batch size 8: none ran" in printed
    assert "The best of all: " in printed and "another one learns differently" in printed
    assert "--config.compute.attention=cudnn" in figures["best_of_all"]


def test_a_sweep_in_which_nothing_runs_is_one_line(monkeypatch, capsys):
    def fail(settings):
        raise ValueError("no such\nkernel")

    monkeypatch.setattr(work, "prepare_train", fail)
    with pytest.raises(UserError, match="must run on this machine, got ValueError: no such kernel"):
        sweep(capsys, 8)


def test_a_sweep_is_written_and_its_flags_can_be_pasted(faked, call, tmp_path):
    out = tmp_path / "sweep.json"
    code, printed, errors = call(
        bench, "train", *SMALL, "--sweep", "--batch_sizes=8,32", f"--out={out}"
    )
    assert code == 0, errors
    figures = json.loads(out.read_text())
    assert figures["what"] == "sweep" and figures["devices"] == "8 x cpu"
    assert figures["best"] in printed
    assert call(bench, "train", SMALL[0], *figures["best"].split())[0] == 0


@pytest.mark.slow
def test_real_steps_are_swept(call, tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "REMAT", ("dots",))
    out = tmp_path / "sweep.json"
    with jax.numpy_dtype_promotion("standard"):  # optax's Adam mixes types
        code, _, errors = call(
            bench, "train", *SMALL, "--sweep", "--batch_sizes=4,8", f"--out={out}"
        )
    assert code == 0, errors
    *works, failed = json.loads(out.read_text())["rows"]
    assert failed["train.batch_size"] == 4
    assert "train.batch_size must be divisible by 8" in failed["failed"]
    assert sorted(x["compute.unroll"] for x in works) == [False, True]
    assert all(x["needed_memory_gb"] > 0 and x["compile_seconds"] > 0 for x in works)


@pytest.mark.parametrize(
    "args, message",
    [
        (["sample", "--sweep"], "sweep must be false for sample: it ranks ways to train"),
        (["train", "--sweep", "--peer"], "peer must be false with --sweep"),
        (["train", "--batch_sizes=4"], "batch_sizes needs --sweep, got 4"),
        (["train", "--sweep", "--batch_sizes=4,0"], "whole numbers above 0, got 4,0"),
        (["train", "--sweep", "--batch_sizes=a"], "batch_sizes must be whole numbers above 0"),
    ],
)
def test_wrong_use_is_one_line(refuse, args, message):
    assert message in refuse(bench, *args, "--config=configs/digits.py")
