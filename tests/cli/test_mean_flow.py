"""MeanFlow through the commands: train, sample with one network call, refuse what it has not."""

import json
import logging

import jax
import numpy as np
import pytest
import random_run

import dit_jax
from dit_jax.checkpoint import store
from dit_jax.cli import convert, evaluate, sample, train
from dit_jax.evals import classifier
from dit_jax.models import dit, flops
from dit_jax.runs import record, summary

SAMPLING = {"sampler": "euler", "num_steps": "1", "cfg_scale": 1.0, "cfg_channels": 0}


def save(path, process):
    """A checkpoint of random weights."""
    model = random_run.MODEL | {"learn_sigma": False}
    conditions = {
        "mean_flow": ("t", "h", "y"),
        "improved_mean_flow": ("t", "h", "omega", "t_min", "t_max", "y"),
    }
    model["conditions"] = conditions[process]
    config = random_run.CONFIG | {"model": model | {"conditions": list(model["conditions"])}}
    config |= {"diffusion": {"process": process}, "sampling": SAMPLING}
    random_run.save(path, config, model=dit.configure(**model))
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save(tmp_path_factory.mktemp("mean"), "mean_flow")


@pytest.fixture(scope="module")
def improved(tmp_path_factory):
    return save(tmp_path_factory.mktemp("improved"), "improved_mean_flow")


def train_digits(call, workdir, *options):
    """Trains a small model by configs/digits_meanflow.py; the lines of its record."""
    config = ("--config=configs/digits_meanflow.py:Pi/4", "--config.train.decay_steps=0")
    with jax.numpy_dtype_promotion("standard"):  # optax's Adam mixes types
        code, _, errors = call(train, *config, f"--workdir={workdir}", *options)
    assert code == 0, errors
    return record.read(workdir / "metrics.jsonl")


def test_a_run_trains_and_samples_with_one_call(call, caplog, tmp_path):
    caplog.set_level(logging.INFO)
    options = (
        *("--config.run.total_steps=4", "--config.run.log_every=1"),
        *("--config.train.warmup_steps=0", "--config.train.accumulation_steps=2"),
        *("--config.run.sample_every=4", "--config.run.checkpoint_every=2"),
        "--config.run.keep_best=1",
    )
    lines = train_digits(call, tmp_path / "run", *options)
    assert [each["step"] for each in lines] == [1, 2, 3, 4]
    assert all(0.9 < each["loss"] < 1 and each["mse"] > 0.1 for each in lines)
    assert f"step 4/4  mse {lines[-1]['mse']:.4f}  " in caplog.text
    meta = store.read_meta(tmp_path / "run" / "checkpoints", 4)
    mean = (lines[-2]["mse"] + lines[-1]["mse"]) / 2
    assert meta["mse"] == pytest.approx(mean) and "loss" not in meta
    assert summary.read(tmp_path / "run").loss == pytest.approx(lines[-1]["mse"], rel=0.5)
    out = tmp_path / "samples.npz"
    assert call(sample, f"{tmp_path}/run", out, "--labels=0-9")[0] == 0
    assert np.load(out)["arr_0"].shape == (10, 8, 8, 1)
    assert "an image takes 1 network call, 1 forward pass" in caplog.text
    assert caplog.messages[-1].endswith(" s, without compilation")
    work = flops.forward_flops(dit_jax.load(tmp_path / "run").config)
    assert f"an image takes {work / 1e9:.4g} GFLOPs" in caplog.messages


def test_the_authors_network_of_improved_mean_flow(call, caplog, tmp_path):
    """Blocks that exist twice; sampling costs one head, and training counts both."""
    caplog.set_level(logging.INFO)
    options = (
        *("--config.diffusion.process=improved_mean_flow", "--config.diffusion.kappa=0.5"),
        *("--config.model.conditioning=in_context_zero", "--config.model.position=rope_1d"),
        *("--config.model.conditions=h,omega,t_min,t_max,y", "--config.model.norm=rms"),
        *("--config.model.mlp=swiglu", "--config.model.qk_norm=true", "--config.model.depth=3"),
        *("--config.model.velocity_head=true", "--config.model.head_depth=1"),
        *("--config.train.optimizer=muon", "--config.train.warmup_steps=0"),
        *("--config.run.total_steps=3", "--config.run.log_every=1", "--config.run.num_samples=4"),
    )
    lines = train_digits(call, tmp_path / "run", *options)
    assert all(np.isfinite(each["loss"]) for each in lines)
    config = dit_jax.load(tmp_path / "run").config
    gates = dit_jax.load(tmp_path / "run", weights="params").params["blocks"]["gate_msa"]
    assert len(gates) == config.num_blocks == 4
    assert all(np.abs(each).max() > 0 for each in gates)  # all blocks are trained
    assert call(sample, f"{tmp_path}/run", tmp_path / "x.npz", "--labels=0-9", "--omega=4")[0] == 0
    work = flops.forward_flops(config)
    assert f"an image takes {work / 1e9:.4g} GFLOPs" in caplog.messages


@pytest.mark.slow
def test_pixel_mean_flow_by_flags(call, caplog, tmp_path):
    """The flags of configs/digits_meanflow.py, on a smaller model; one step and three."""
    caplog.set_level(logging.INFO)
    options = (
        *("--config.diffusion.process=improved_mean_flow", "--config.diffusion.prediction=x0"),
        *("--config.diffusion.kappa=0.5", "--config.model.velocity_head=true"),
        *("--config.diffusion.noise_scale=2", "--config.run.total_steps=150"),
        *("--config.train.warmup_steps=10", "--config.run.log_every=10"),
        "--config.run.sample_every=150",
    )
    mse = [each["mse"] for each in train_digits(call, tmp_path / "run", *options)]
    assert np.mean(mse[-5:]) < 0.5 * mse[0]
    images = []
    for flags in ([], ["--omega=4"], ["--num_steps=3"]):
        out = tmp_path / f"samples{len(images)}.npz"
        assert call(sample, f"{tmp_path}/run", out, "--labels=0-9", *flags)[0] == 0
        images += [np.load(out)["arr_0"]]
    assert images[0].shape == (10, 8, 8, 1)
    assert not any(np.array_equal(images[0], other) for other in images[1:])
    assert "an image takes 1 network call, 1 forward pass" in caplog.text


@pytest.mark.parametrize(
    "option, message",
    [
        ("--cfg_scale=2", "cfg_scale must be 1 for process mean_flow, whose guidance is learned"),
        ("--sampler=heun", "sampler must be euler or ddim for process mean_flow, which learns"),
        ("--sampler=ddim --eta=1", "eta must be 0 for process mean_flow, got 1.0"),
        (
            "--omega=2",
            "omega must be left at 1 for process mean_flow, which does not use it, got 2.0",
        ),
        ("--cache=every:2", "cache must be none for process mean_flow, got every:2"),
        ("--omega=0.5", "omega must be at least 1, got 0.5"),
        ("--omega_interval=0.5,x", "omega_interval must be two numbers, as 0.1,0.7, got '0.5,x'"),
        ("--num_steps=0", "num_steps must be in 1 .. 100000, got '0'"),
    ],
)
def test_what_a_model_has_not_is_one_line(option, message, refuse, checkpoint, tmp_path):
    line = refuse(sample, checkpoint, tmp_path / "x.png", "--labels=3", *option.split())
    assert message in line


def test_there_is_no_cache_to_calibrate(refuse, checkpoint):
    line = refuse(sample, checkpoint, "--calibrate=4")
    assert "calibrate must be left out for process mean_flow, which has no cache" in line


@pytest.mark.parametrize("interval, message", [("0.5,1.2", "in 0 .. 1"), ("0.6,0.5", "first <=")])
def test_an_interval_outside_the_times_is_one_line(interval, message, refuse, improved, tmp_path):
    option = f"--omega_interval={interval}"
    line = refuse(sample, improved, tmp_path / "x.png", "--labels=3", option)
    assert "omega_interval must be" in line and message in line


@pytest.mark.parametrize(
    "option, message",
    [
        ("--config.compute.attention=cudnn", "compute.attention must be auto or xla for a loss"),
        ("--config.sampling.cfg_scale=2", "sampling.cfg_scale must be 1 for process mean_flow"),
        ("--config.diffusion.same_times=-0.1", "diffusion.same_times must be in 0 .. 1, got -0.1"),
        ("--config.diffusion.kappa=1", "diffusion.kappa must be in [0, 1), got 1.0"),
    ],
)
def test_training_refuses_in_one_line(option, message, refuse, tmp_path):
    config = "--config=configs/digits_meanflow.py"
    assert message in refuse(train, config, f"--workdir={tmp_path}/run", option)


def test_a_call_is_the_velocity_and_may_be_guided(improved):
    model = dit_jax.load(improved)
    x, t, y = np.ones((2, 8, 8, 1), np.float32), np.float32([0.3, 0.8]), [3, 10]
    given = {"h": 0 * t, "omega": 0 * t + 1, "t_min": 0 * t, "t_max": 0 * t + 1}
    apply = dit.make_apply(model.config)
    expected = apply(model.params, x, t=t, y=np.int32(y), **given)
    np.testing.assert_allclose(model(x, t, y), expected, atol=1e-5)
    plain, guided = (model.sample([3, 4], omega=omega) for omega in (1, 6))
    early = model.sample([3, 4], omega=6, omega_interval=(0.4, 0.6))
    assert not np.array_equal(plain, guided) and not np.array_equal(early, guided)
    assert model.cost(num_steps="3", omega=6) == (3, 3)


@pytest.mark.slow
def test_steps_and_scales_are_swept(call, improved, monkeypatch, tmp_path):
    monkeypatch.setattr(classifier, "NUM_STEPS", (60, 60))
    flags = ["--sweep=omega=1,6", "--sweep=num_steps=1,2,4", "--num_samples=40"]
    code, _, errors = call(evaluate, *flags, f"--out={tmp_path}/sweep", improved)
    assert code == 0, errors
    results = json.loads((tmp_path / "sweep/sweep.json").read_text())
    one_pass = results[0]["receipt"]["model"]["gflops"]
    for each in results:
        cost, count = each["receipt"]["model"], int(each["options"]["num_steps"])
        assert cost["calls"] == cost["passes"] == count
        assert cost["sampling_gflops"] == pytest.approx(count * one_pass)
    assert len({str(each["receipt"]["features"]) for each in results}) == 6


def test_a_trajectory_ends_at_the_samples(checkpoint):
    model = dit_jax.load(checkpoint)
    levels = model.sample([3], trajectory=True, num_steps="4")
    assert levels.shape == (5, 1, 8, 8, 1)
    np.testing.assert_array_equal(levels[-1], model.sample([3], num_steps="4"))
    assert model.sample([3], trajectory="x0").shape == (2, 2, 1, 8, 8, 1)


@pytest.mark.parametrize(
    "name, out, flags",
    [("to-torch", "a.pt", []), ("to-torch", "b", ["--bundle"]), ("to-diffusers", "c", [])],
)
def test_no_other_code_samples_it(name, out, flags, refuse, checkpoint, tmp_path):
    line = refuse(convert, name, checkpoint, tmp_path / out, *flags)
    assert "conditions must be ('t', 'y') for PyTorch, as in the paper's DiT, got ('t', 'h'" in line
