import itertools
import json
import time

import jax
import pytest

from configs import digits, digits_meanflow, pixels
from dit_jax import settings as settings_lib
from dit_jax.cli import bench
from dit_jax.runs import bench as work
from dit_jax.runs import build

SMALL = ("--config=configs/digits.py:Pi/4", "--config.train.batch_size=8", "--repeats=3")


@pytest.mark.parametrize("what", ["train", "sample"])
def test_every_figure_is_printed_and_written(call, tmp_path, what):
    out = tmp_path / "bench.json"
    with jax.numpy_dtype_promotion("standard"):  # optax's Adam mixes types
        options = (*SMALL, f"--out={out}", "--config.sampling.num_steps=5")
        options += ("--config.data.source=synthetic",)
        code, printed, _ = call(bench, what, *options)
    assert code == 0
    figures = json.loads(out.read_text())
    assert all(name in printed for name in figures)
    assert figures["what"] == what and figures["devices"] == "8 x cpu"
    assert figures["images_per_second"] == pytest.approx(8 / figures["seconds_median"])
    assert figures["model_tflops_per_second"] > 0 and figures["compile_seconds"] > 0
    assert "mfu" not in figures  # the peak of a CPU is unknown
    assert 0.1 < figures["peak_memory_gb"] < 24


@pytest.mark.slow
@pytest.mark.parametrize("config, variant", [(digits_meanflow, "Pi/4"), (pixels, "Pi/7")])
def test_other_objectives_and_models_are_measured(call, tmp_path, config, variant):
    flags = (f"--config={config.__file__}:{variant}", "--config.train.batch_size=8", "--repeats=2")
    for what in ("train", "sample"):
        out = tmp_path / f"{what}.json"
        with jax.numpy_dtype_promotion("standard"):
            code, _, errors = call(bench, what, *flags, f"--out={out}")
        assert code == 0, errors
    figures = json.loads((tmp_path / "train.json").read_text())
    flops = build.parts(build.read(config.get_config(variant))).train_flops
    rate = figures["model_tflops_per_second"] / figures["images_per_second"]  # TFLOP of an image
    assert rate == pytest.approx(flops / 1e12)


def test_loading_is_measured_on_one_core(call, tmp_path):
    out = tmp_path / "bench.json"
    assert call(bench, "data", *SMALL, f"--out={out}")[0] == 0
    figures = json.loads(out.read_text())
    rate = figures["images_per_second_per_core"]
    assert figures["examples"] == 1500 and rate == pytest.approx(8 / figures["seconds_median"])
    assert figures["cores_for_1459_images_per_second"] == pytest.approx(1459 / rate)


@pytest.mark.parametrize("what", [pytest.param("train", marks=pytest.mark.slow), "sample"])
def test_peer_figures_are_compared_with_ours(call, tmp_path, what, monkeypatch):
    monkeypatch.setattr("torch.compile", lambda net: net)  # compiling takes minutes
    out = tmp_path / "bench.json"
    with jax.numpy_dtype_promotion("standard"):
        options = (*SMALL, f"--out={out}", "--config.sampling.num_steps=3", "--peer")
        code, _, _ = call(bench, what, *options)
    assert code == 0
    figures = json.loads(out.read_text())
    for name in ("torch", "torch_compile"):
        ratio = figures[f"{name}_seconds_median"] / figures["seconds_median"]
        assert figures[f"dit_jax_over_{name}"] == pytest.approx(ratio)
        assert figures[f"{name}_images_per_second"] > 0


@pytest.mark.slow
def test_the_wait_for_real_data_is_measured(call, tmp_path):
    out = tmp_path / "bench.json"
    with jax.numpy_dtype_promotion("standard"):
        assert call(bench, "train", *SMALL, f"--out={out}")[0] == 0
    figures = json.loads(out.read_text())
    assert figures["data"] == "digits" and 0 < figures["data_wait"] < 1
    assert figures["seconds_mean_with_data"] > 0 and figures["loader_images_per_second"] > 0


def test_batches_of_the_run_are_waited_for(monkeypatch):
    seen = []

    def step(state, batch, key):
        time.sleep(0.01)
        seen.append(batch)
        return state, {}

    monkeypatch.setattr(work, "compile_timed", lambda *_: (step, 0.0))
    changes = {"train.batch_size": 8}
    settings = settings_lib.replace(build.read(digits.get_config("Pi/4")), changes)
    figures = work.measure_waiting(settings, repeats=3, warmup=1)
    assert figures["data"] == "digits" and 0 < figures["data_wait"] < 1
    assert figures["seconds_mean_with_data"] >= 0.01 and figures["loader_images_per_second"] > 8
    assert len(seen) == 4 and seen[0]["image"].shape == (8, 8, 8, 1)


def endless(seconds):
    while True:
        time.sleep(seconds)
        yield {}


@pytest.mark.parametrize("loading, least, most", [(0.03, 0.6, 0.95), (0.0, 0.0, 0.1)])
def test_the_wait_for_slow_data_is_their_share_of_a_step(loading, least, most):
    def step(state, batch, key):
        time.sleep(0.01)
        return state + 1, {}

    state, waited, total = work.time_waiting(step, 0, endless(loading), None, 5)
    assert state == 5 and least < waited / total < most
    assert waited >= 5 * loading


def test_what_was_loaded_ahead_is_not_timed():
    given = iter([{}] * 3)
    slow = itertools.chain(given, endless(0.02))
    assert 20 < work.drain(slow, 3, 4) < 50  # batches per second
    assert next(given, None) is None


@pytest.mark.parametrize(
    "data, message",
    [
        ({"source": "synthetic"}, "random: data.source is synthetic"),
        ({"source": "images"}, "not measured: data.path must be given"),
        ({"source": "latents", "path": "/nowhere"}, "not measured: data.path must exist, got /now"),
        ({"source": "digits", "space": "pixels"}, "not measured: model.input_size must be (8, 8)"),
    ],
)
def test_data_that_cannot_be_opened_are_named(data, message):
    settings = settings_lib.read({"model": {"size": "Ti"}, "data": data})
    (found,) = work.measure_waiting(settings, repeats=2, warmup=1).values()
    assert found.startswith(message)


def test_runs_take_turns():
    order = []
    runs = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    seconds, first = work.time_in_turn(runs, repeats=2, warmup=1)
    assert order == ["a", "b"] * 3
    assert len(seconds["a"]) == len(seconds["b"]) == 2 and first.keys() == {"a", "b"}


def test_summarize_uses_median_and_quartiles():
    settings = settings_lib.read({"train": {"batch_size": 32}})
    figures = work.summarize([0.5, 0.25, 0.5, 0.75, 0.5], 2e12, settings)
    assert figures["images_per_second"] == 64
    assert figures["model_tflops_per_second"] == pytest.approx(4)
    assert figures["seconds_quartile_range"] == pytest.approx(0.25)


@pytest.mark.parametrize(
    "args, message",
    [
        (
            ["--config=configs/digits.py"],
            "takes train|sample|operations|data|encode|decode|start, got ''",
        ),
        (
            ["fly", "--config=configs/digits.py"],
            "one of train, sample, operations, data, encode, decode, start, got 'fly'",
        ),
        (["train"], "--config must be given"),
        (["data", "--peer", "--config=configs/digits.py"], "peer must be false for data"),
        (
            ["sample", "--peer", "--config=configs/digits.py", "--config.sampling.sampler=unipc"],
            "sampling must be that of ddpm or ddim with evenly spaced steps and constant guidance",
        ),
        (
            ["train", "--peer", "--config=configs/digits.py", "--config.train.optimizer=muon"],
            "train.optimizer must be adamw for --peer, got muon",
        ),
        (
            ["train", "--peer", "--config=configs/digits.py", "--config.diffusion.process=linear"],
            "predict noise for a peer in PyTorch, got velocity on linear",
        ),
        (
            ["train", "--config=configs/digits.py", "--repeats=1"],
            "repeats must be a whole number of at least 2, ",
        ),
        (["train", "--config=configs/digits.py", "--out=no/where"], "out must be in a directory"),
    ],
)
def test_wrong_use_is_one_line(refuse, args, message):
    assert message in refuse(bench, *args)


def test_a_second_config_is_not_overwritten(refuse, tmp_path):
    (tmp_path / "mine.py").write_text("years")
    line = refuse(bench, "train", "configs/digits.py", tmp_path / "mine.py")
    assert line.endswith(f"out must end with .json, got {tmp_path}/mine.py")
    assert (tmp_path / "mine.py").read_text() == "years"
