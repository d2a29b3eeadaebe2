"""SiT's checkpoints: the public format, with random weights, through dit-convert and back."""

import argparse
import json

import numpy as np
import pytest
import random_run
import torch

import dit_jax
from dit_jax.cli import convert
from dit_jax.convert import files, torch_dit, torch_model
from dit_jax.models import dit
from dit_jax.settings import SIT, Diffusion

MODEL = dit.configure("Pi", 4, input_size=(8, 8), in_channels=4, num_classes=10)
ARGS = {
    **{"model": "SiT-XL/2", "image_size": 256, "num_classes": 1000, "path_type": "Linear"},
    **{"prediction": "velocity", "loss_weight": None, "sample_eps": None, "train_eps": None},
}


@pytest.fixture(scope="module")
def weights():
    """The official names: eight channels come out, of which SiT drops four, and 10 + 1 labels."""
    params, _ = random_run.draw(MODEL)
    state_dict = torch_dit.to_official(params, MODEL)
    assert state_dict["final_layer.linear.weight"].shape == (4 * 4 * 8, 64)
    assert state_dict["y_embedder.embedding_table.weight"].shape == (11, 64)
    return state_dict


def save(path, weights, **args):
    """Writes what SiT's train.py does."""
    tensors = {name: torch.from_numpy(x) for name, x in weights.items()}
    args = argparse.Namespace(**ARGS | args)
    torch.save({"model": tensors, "ema": tensors, "opt": {}, "args": args}, path)
    return path


def sample_as_sit(weights, x, y, count):
    """Euler's method of SiT's transport: s from 0, noise, to 1, data, in its own words."""
    net = torch_model.DiT(**MODEL.to_json())
    net.load_state_dict({name: torch.from_numpy(x) for name, x in weights.items()})
    x, y = torch.from_numpy(x.transpose(0, 3, 1, 2).copy()), torch.from_numpy(y)
    times = torch.linspace(0, 1, count + 1)
    with torch.no_grad():
        for s, later in zip(times[:-1], times[1:], strict=True):
            velocity, _ = net.eval()(x, s.expand(len(x)), y).chunk(2, dim=1)
            x = x + (later - s) * velocity
    return x.numpy().transpose(0, 2, 3, 1)


@pytest.mark.parametrize(
    "path_type, process, flags",
    [("Linear", "linear", []), ("GVP", "gvp", ["--prediction=velocity"])],
)
def test_a_sit_is_sampled_as_a_sit(call, tmp_path, weights, path_type, process, flags):
    """By the args of its file, with time, sign and dead channels as its own code has them."""
    file, out = save(tmp_path / "x.pt", weights, path_type=path_type), tmp_path / "out"
    code, report, errors = call(convert, "from-torch", file, out, *flags)
    assert code == 0 and "passed: relative error" in report, errors
    found = json.loads((out / "parity.json").read_text())
    assert [each["t"] for each in found["steps"]] == [0, 0.5, 1]
    model = dit_jax.load(out)
    assert model.settings.diffusion == Diffusion(**SIT | {"process": process})
    assert model.config == MODEL and model.settings.sampling.cfg_interval == (0, 1)
    noise = np.random.default_rng(0).standard_normal((2, 8, 8, 4), np.float32)
    options = {"sampler": "euler", "num_steps": "7", "cfg_scale": 1.0}
    samples = model.sample([3, 7], noise=noise, **options)
    expected = sample_as_sit(weights, noise, np.array([3, 7]), 7)
    np.testing.assert_allclose(samples, expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("end", [".pt", pytest.param(".safetensors", marks=pytest.mark.slow)])
def test_a_sit_comes_back_bit_for_bit(call, tmp_path, weights, end):
    file, out, back = save(tmp_path / "x.pt", weights), tmp_path / "out", tmp_path / f"back{end}"
    for step in (("from-torch", file, out), ("to-torch", out, back)):
        code, _, errors = call(convert, *step)
        assert code == 0, errors
    found = files.read_state_dict(back)
    assert found.keys() == weights.keys()
    for name, x in weights.items():
        np.testing.assert_array_equal(found[name], x)
    args = files.read_args(back)
    assert args == {"path_type": "Linear", "prediction": "velocity"}
    if end == ".pt":  # as SiT's find_model does, with PyTorch's default of weights only
        loaded = torch.load(back)
        torch_model.DiT(**MODEL.to_json()).load_state_dict(loaded["ema"])


def test_a_sit_of_another_objective_is_one_line(refuse, tmp_path, weights):
    file = save(tmp_path / "x.pt", weights, prediction="score")
    line = refuse(convert, "from-torch", file, tmp_path / "out")
    assert "prediction of a SiT must be velocity or noise, got score in" in line


def test_a_sit_has_no_schedule(refuse, tmp_path, weights):
    file = save(tmp_path / "x.pt", weights)
    line = refuse(convert, "from-torch", file, tmp_path / "out", "--schedule=linear")
    assert "--schedule must be left out for a SiT, which has a path, got linear" in line
