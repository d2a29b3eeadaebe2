import json

import jax
import pytest
from PIL import Image

from dit_jax import settings as settings_lib
from dit_jax.cli import bench
from dit_jax.errors import UserError
from dit_jax.runs import bench as work
from dit_jax.runs import growth

SMALL = ("configs/digits.py:Pi/4", "--config.train.batch_size=8", "--repeats=2", "--warmup=1")


def fake_train(settings):
    """A step of T^1.5 B milliseconds and T^1.2 B TFLOPs; 4,096 tokens do not fit."""
    tokens = (settings.model.input_size[0] // settings.model.patch_size) ** 2
    if tokens == 4096:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 30 GB")
    size = settings.train.batch_size
    return work.Work(lambda: 1e-3 * tokens**1.5 * size, 1e12 * tokens**1.2 * size, 0.1, 1, None)


@pytest.fixture
def faked(monkeypatch):
    monkeypatch.setattr(work, "prepare_train", fake_train)
    monkeypatch.setattr(
        work, "time_in_turn", lambda runs, *_: ({k: [run()] * 3 for k, run in runs.items()}, {})
    )


def test_growth_is_fitted_and_drawn(faked, call, tmp_path):
    picture, out = tmp_path / "growth.png", tmp_path / "growth.json"
    code, printed, _ = call(bench, "train", *SMALL, f"--growth={picture}", f"--out={out}")
    assert code == 0
    figures = json.loads(out.read_text())
    rows = figures["rows"]
    assert [each["tokens"] for each in rows["tokens"]] == [64, 256, 1024, 4096]
    assert [each["batch"] for each in rows["batch"]] == [1, 2, 4, 8]
    assert "failed" in rows["tokens"][-1] and "4096      8  fails: a step must fit" in printed
    assert figures["exponents"]["tokens"] == pytest.approx({"measured": 1.5, "counted": 1.2})
    assert figures["exponents"]["batch"] == pytest.approx({"measured": 1.0, "counted": 1.0})
    assert "time grows as tokens^1.50, FLOPs ^1.20" in printed
    with Image.open(picture) as drawn:
        assert drawn.width > 500


def test_a_step_is_measured(call, tmp_path, monkeypatch):
    monkeypatch.setattr(growth, "SIDES", (2, 4))
    monkeypatch.setattr(growth, "NUM_BATCHES", 0)
    picture = tmp_path / "growth.png"
    code, printed, _ = call(bench, "train", *SMALL, f"--growth={picture}")
    assert code == 0 and printed.count("fails") == 0 and picture.is_file()
    lines = [line.split() for line in printed.splitlines()]
    tokens, batch, milliseconds, tflop = zip(*lines[1:3], strict=True)
    assert tokens == ("4", "16") and set(batch) == {"8"}
    assert all(float(each) > 0 for each in milliseconds + tflop)
    assert 2 < float(tflop[1]) / float(tflop[0]) < 16


def test_a_growth_without_a_case_is_one_line(monkeypatch):
    def fail(settings):
        raise UserError("model.size must be small")

    monkeypatch.setattr(work, "prepare_train", fail)
    with pytest.raises(UserError, match="^a case of the growth must run .*, got model.size must"):
        growth.measure(settings_lib.Settings(), repeats=2, warmup=1)


@pytest.mark.parametrize(
    "options, message",
    [
        (["sample", "--growth=x.png"], "growth must be left out for sample: it is of training"),
        (["train", "--growth=x.png", "--peer"], "peer must be false with --growth"),
        (["train", "--growth=x.png", "--sweep"], "sweep must be false with --growth"),
        (["train", "--growth=x.pdf"], "growth must end with .png, got x.pdf"),
        (
            ["train", "--growth=x.png", "--config.model.input_size=8,8,8"],
            "model.input_size must have two axes for --growth, got (8, 8, 8)",
        ),
    ],
)
def test_flags_that_do_not_fit_are_one_line(options, message, refuse):
    assert message in refuse(bench, options[0], *SMALL, *options[1:])
