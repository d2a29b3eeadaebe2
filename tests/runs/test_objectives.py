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
from dit_jax.models import dit
from dit_jax.runs import build, fields, run

FAST = (("linear", "velocity"),)  # ten seconds each
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


def save(path, settings, parts, state):
    items = {name: getattr(state, name) for name in ("params", "ema", "opt_state")}
    meta = {"model": parts.model._asdict(), "config": settings_lib.to_json(settings)}
    with store.open_writer(background=False) as writer:
        store.save(writer, path / "checkpoints", int(state.step), items, meta)


@pytest.mark.parametrize("process, prediction", PAIRS)
def test_every_objective_trains_resumes_and_samples(process, prediction, tmp_path):
    settings = read(process=process, prediction=prediction, weight="min_snr")
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
        ({"process": "sde"}, "^diffusion.process must be one of ddpm, linear, gvp, got 'sde'$"),
        (
            {"process": "linear", "weight": "velocity"},
            "^diffusion.weight must be constant for prediction velocity, got velocity: the same$",
        ),
        (
            {"weight": "velocity"},
            "^diffusion.weight must not be velocity for process ddpm, which ",
        ),
        (
            {"process": "linear", "prediction": "x0", "weight": "velocity", "weight_gamma": 2.0},
            "^diffusion.weight_gamma must be 0.0 for weight velocity, which has none, got 2.0$",
        ),
        ({"noise_scale": 2.0}, "^diffusion.noise_scale must be 1.0 for process ddpm, which counts"),
        ({"noise_scale": 0.0}, "^diffusion.noise_scale must be above 0, got 0.0$"),
        ({"shift": -1.0}, "^diffusion.shift must be above 0, got -1.0$"),
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
