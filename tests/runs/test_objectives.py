"""Every process with every prediction: one line of a config trains, resumes and samples."""

import importlib

import jax
import numpy as np
import pytest

import dit_jax
from dit_jax import settings as settings_lib
from dit_jax.checkpoint import store
from dit_jax.diffusion import fields as diffusion_fields
from dit_jax.errors import UserError
from dit_jax.models import dit, flops
from dit_jax.runs import build, fields, run

FAST = (("linear", "velocity"), ("mean_flow", "velocity"))  # ten seconds each
PAIRS = [
    pytest.param(name, each, marks=() if (name, each) in FAST else pytest.mark.slow)
    for name, kinds in diffusion_fields.PREDICTIONS.items()
    for each in kinds
]
CONFIG = {
    "model": {
        **{"size": "Xs", "patch_size": 4, "input_size": (8, 8), "in_channels": 1},
        "num_classes": 10,
    },
    "compute": {"dtype": "float32"},
    "data": {"source": "digits", "space": "pixels"},
    "train": {"batch_size": 8, "learning_rate": 1e-3, "ema_decay": 0.5},
    "sampling": {"sampler": "ddim", "num_steps": "2", "cfg_scale": 2.0, "cfg_channels": 0},
}


@pytest.fixture(autouse=True)
def small_size(monkeypatch):
    monkeypatch.setitem(dit.SIZES, "Xs", (1, 16, 2))


def read(**diffusion):
    return settings_lib.read(CONFIG | {"diffusion": diffusion})


def read_objective(process, prediction):
    """Settings with a weight of the loss, and guidance in sampling or in training."""
    if process in diffusion_fields.MEAN_FLOWS:
        changes = {"diffusion": {"process": process, "prediction": prediction}}
        if prediction == "x0":
            changes["diffusion"]["noise_scale"] = 2.0
            changes["model"] = CONFIG["model"] | {"velocity_head": True}
        changes["sampling"] = CONFIG["sampling"] | {"num_steps": "1", "cfg_scale": 1.0}
        return settings_lib.read(CONFIG | changes)
    return read(process=process, prediction=prediction, weight="min_snr")


def save(path, settings, parts, state):
    items = {name: getattr(state, name) for name in ("params", "ema", "opt_state")}
    meta = {"model": parts.model._asdict(), "config": settings_lib.to_json(settings)}
    with store.open_writer(background=False) as writer:
        store.save(writer, path / "checkpoints", int(state.step), items, meta)


@pytest.mark.parametrize("process, prediction", PAIRS)
def test_every_objective_trains_resumes_and_samples(process, prediction, tmp_path):
    settings = read_objective(process, prediction)
    parts = build.parts(settings, jax.devices()[:1])
    assert parts.model.learn_sigma == (process == "ddpm")
    rng, key, step = np.random.default_rng(0), jax.random.key(1), parts.jit_step()
    batch = {"image": rng.integers(0, 256, (8, 8, 8, 1)).astype(np.uint8), "label": np.arange(8)}
    batch["label"] = batch["label"].astype(np.int32)
    state, metrics = step(parts.create_state(jax.random.key(0)), batch, key)
    assert metrics["mse"] > 0 and ("vb" in metrics) == (process == "ddpm")
    if "vb" not in metrics:
        assert metrics["loss"] != metrics["mse"]  # which is not weighted
    save(tmp_path, settings, parts, state)
    on, _ = step(state, batch, key)
    state, _ = run.resume(settings, parts, None, tmp_path / "checkpoints", None)
    resumed, _ = step(state, batch, key)
    jax.tree.map(np.testing.assert_array_equal, resumed, on)
    model = dit_jax.load(tmp_path)
    assert model.settings.diffusion == settings.diffusion
    images = model.sample([3, 1])  # a UserError if one is not finite
    assert images.shape == (2, 8, 8, 1) and images.dtype == np.uint8


def test_tokens_skip_blocks_in_training_and_count_less():
    train = CONFIG["train"] | {"route_share": 0.5, "route_blocks": [0, 0]}
    parts = build.parts(settings_lib.read(CONFIG | {"train": train}), jax.devices()[:1])
    assert parts.routing.num_skipping == 2 and parts.routing.num_tokens == 4
    assert parts.train_flops < build.parts(read(), jax.devices()[:1]).train_flops
    with pytest.raises(UserError, match="^train.route_blocks must be .*, in 0 .. 0, got "):
        build.parts(settings_lib.read(CONFIG | {"train": train | {"route_blocks": [0, 1]}}))
    settings = {"train": train, "diffusion": {"process": "mean_flow"}}
    settings["sampling"] = CONFIG["sampling"] | {"num_steps": "1", "cfg_scale": 1.0}
    with pytest.raises(UserError, match="^train.route_share must be 0 for process mean_flow, got "):
        build.parts(settings_lib.read(CONFIG | settings), jax.devices()[:1])


def test_a_step_of_mean_flow_costs_its_derivative_and_its_guidance_too():
    passes = []
    for process in ("linear", "mean_flow", "improved_mean_flow"):
        settings = read_objective(process, "velocity")
        parts = build.parts(settings, jax.devices()[:1])
        passes.append(parts.train_flops / flops.forward_flops(parts.model))
        assert build.train_passes(settings) == passes[-1]
    assert passes == pytest.approx([3, 6, 6], rel=0.02)  # attention has two products as its tangent


@pytest.mark.parametrize("name", ["base", "digits", "fashion", "imagenet256", "scaling"])
@pytest.mark.parametrize("process", ["linear", "gvp"])
def test_one_line_chooses_a_path_in_every_config(name, process):
    config = importlib.import_module(f"configs.{name}").get_config()
    config.diffusion.process = process
    settings = settings_lib.read(config.to_dict())
    fields.check(settings)
    assert settings.diffusion.prediction == "velocity" and not settings.model.learn_sigma


@pytest.mark.parametrize(
    "diffusion, message",
    [
        (
            {"prediction": "velocity", "process": "ddpm"},
            "^diffusion.prediction must be one of noise, v, x0 for process ddpm, got velocity$",
        ),
        ({"process": "sde"}, "^diffusion.process must be one of ddpm, linear, gvp, .*, got 'sde'$"),
        (
            {"process": "linear", "weight": "velocity"},
            "^diffusion.weight must be constant for prediction velocity, got velocity: the same$",
        ),
        (
            {"weight": "velocity"},
            "^diffusion.weight must not be velocity for process ddpm, only for paths",
        ),
        (
            {"process": "linear", "prediction": "x0", "weight": "velocity", "weight_gamma": 2.0},
            "^diffusion.weight_gamma must be left at 0.0 for weight velocity, which .* got 2.0$",
        ),
        ({"noise_scale": 2.0}, "^diffusion.noise_scale must be 1.0 for process ddpm, which counts"),
        ({"noise_scale": 0.0}, "^diffusion.noise_scale must be above 0, got 0.0$"),
        ({"shift": -1.0}, "^diffusion.shift must be above 0, got -1.0$"),
        (
            {"process": "linear", "kappa": 0.2},
            "^diffusion.kappa must be left at 0.5 for process linear, which .* got 0.2$",
        ),
        (
            {"process": "mean_flow", "weight": "min_snr"},
            "^diffusion.weight must be left at constant for process mean_flow, .* got min_snr",
        ),
        (
            {"process": "improved_mean_flow", "omega": 2.0},
            "^diffusion.omega must be left at 1.0 for process improved_mean_flow, .* got 2.0$",
        ),
        (
            {"process": "improved_mean_flow", "prediction": "noise"},
            "^diffusion.prediction must be one of velocity, x0 for process improved_mean_flow, "
            "got noise$",
        ),
        (
            {"process": "mean_flow", "prediction": "x0"},
            "^diffusion.prediction must be one of velocity for process mean_flow, got x0$",
        ),
        (
            {"process": "mean_flow", "omega_interval": [0, 2]},
            r"^diffusion.omega_interval must be first <= last in 0 .. 1, got \(0, 2\)$",
        ),
        (
            {"process": "mean_flow", "same_times": 1.5},
            "^diffusion.same_times must be in 0 .. 1, got 1.5$",
        ),
        (
            {"process": "improved_mean_flow", "omega_max": 1.0},
            "^diffusion.omega_max must be above 1, got 1.0$",
        ),
        (
            {"process": "mean_flow"},
            "^sampling.cfg_scale must be 1 for process mean_flow, whose guidance is learned, got 2",
        ),
        ({"time": "logit_normal"}, "^diffusion.time must be uniform for process ddpm"),
    ],
)
def test_what_does_not_fit_is_one_line(diffusion, message):
    with pytest.raises(UserError, match=message):
        fields.check(read(**diffusion))


def test_times_outside_a_path_are_one_line():
    settings = read(process="linear")
    assert settings.sampling.cfg_interval == (0, 1)
    wrong = CONFIG["sampling"] | {"cfg_interval": (0, 500)}
    settings = settings_lib.read(CONFIG | {"diffusion": {"process": "linear"}, "sampling": wrong})
    message = r"^sampling.cfg_interval must be first <= last in 0 .. 1, got \(0, 500\)$"
    with pytest.raises(UserError, match=message):
        fields.check(settings)


@pytest.mark.parametrize(
    "topic, fields_of_it, message",
    [
        (
            "sampling",
            {"sampler": "heun"},
            "^sampling.sampler must be euler or ddim for process mean_flow, which learns whole "
            "steps, got heun$",
        ),
        ("sampling", {"eta": 0.5}, "^sampling.eta must be 0 for process mean_flow, got 0.5$"),
        (
            "sampling",
            {"omega": 2.0},
            "^sampling.omega must be left at 1 for process mean_flow, which .* got 2.0$",
        ),
        ("sampling", {"num_steps": "0"}, "^sampling.num_steps must be in 1 .. 100000, got '0'$"),
        (
            "compute",
            {"attention": "cudnn"},
            "^compute.attention must be auto or xla for a loss with a jvp, got cudnn$",
        ),
        (
            "train",
            {"class_dropout_prob": 0.0},
            "^diffusion.process must be another if train.class_dropout_prob is 0 unless omega is 1 "
            "and kappa 0: mean_flow guides by the null label$",
        ),
        (
            "model",
            {"conditions": ["t", "y"]},
            "^model.conditions must be t,h,y in this order, with or without t, .* got t,y$",
        ),
        (
            "model",
            {"velocity_head": True},
            "^model.velocity_head must be false without improved_mean_flow, got true$",
        ),
    ],
)
def test_what_does_not_fit_mean_flow_is_one_line(topic, fields_of_it, message):
    plain = CONFIG["sampling"] | {"num_steps": "1", "cfg_scale": 1.0}
    config = CONFIG | {"diffusion": {"process": "mean_flow"}, "sampling": plain}
    fields.check(settings_lib.read(config))
    with pytest.raises(UserError, match=message):
        fields.check(settings_lib.read(config | {topic: config[topic] | fields_of_it}))


def test_one_field_chooses_the_conditions_and_the_scale_of_the_time():
    settings = read(process="mean_flow")
    assert settings.model.conditions == ("t", "h", "y") and settings.diffusion.time_scale == 1
    assert read(process="mean_flow", time_scale=1000.0).diffusion.time_scale == 1000
    assert read(process="linear").diffusion.time_scale == 1000
    assert settings_lib.read(settings_lib.to_json(settings)) == settings


def test_mean_flow_is_watched_by_what_is_not_always_one():
    assert diffusion_fields.watched(read(process="mean_flow").diffusion) == "mse"
    assert diffusion_fields.watched(read(process="linear").diffusion) == "loss"
