"""dit-convert vae from end to end: folders, files, the hub, and what it refuses."""

import json
import shutil

import diffusers
import jax
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dit_jax.cli import convert
from dit_jax.convert import torch_vae
from dit_jax.sampling import autoencoder

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of a small random AutoencoderKL, of 32 groups as Stable Diffusion's."""
    path = tmp_path_factory.mktemp("diffusers") / "vae"
    torch.manual_seed(0)
    diffusers.AutoencoderKL(
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        scaling_factor=0.5,
    ).save_pretrained(path)
    return path


def done(call, *args):
    code, out, errors = call(convert, *args)
    assert code == 0, errors
    return out


def test_a_folder_comes_in_with_proof(call, folder, tmp_path):
    assert "the same to" in done(call, "vae", folder, tmp_path / "out")
    report = json.loads((tmp_path / "out" / "parity.json").read_text())
    assert [part["part"] for part in report["parts"]] == ["moments", "decoded"]
    assert report["passed"] and report["parts"][0]["relative"] <= 1e-5
    assert WEIGHTS in report["files"]["from"]
    model = autoencoder.load(tmp_path / "out")
    assert model.config.scale == (0.5,) and model.config.channels == (32, 32)
    state_dict = load_file(folder / WEIGHTS)
    for name, x in torch_vae.to_torch(jax.device_get(model.params)).items():
        np.testing.assert_array_equal(x, state_dict[name])
    fields = done(call, "inspect", tmp_path / "out")
    assert "autoencoder of dit_jax" in fields and "(32, 32)" in fields
    assert "autoencoder of diffusers" in done(call, "inspect", folder)


@pytest.mark.parametrize("name", ["x.safetensors", "x.bin"])
def test_a_file_alone_is_taken_for_stable_diffusions(call, caplog, folder, tmp_path, name):
    tensors = load_file(folder / WEIGHTS)
    (save_file if name.endswith("tensors") else torch.save)(tensors, tmp_path / name)
    assert "the same to" in done(call, "vae", tmp_path / name, tmp_path / "out")
    assert "no config.json: taken as Stable Diffusion's, groups of norms 32" in caplog.text
    assert autoencoder.load(tmp_path / "out").config.scale == (0.18215,)


def test_from_the_hub(call, folder, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda name, **_: asked.append(name) or str(folder)
    )
    out = tmp_path / "out"
    assert "the same to" in done(call, "vae", out, "--from_hub=stabilityai/sd-vae-ft-ema")
    assert asked == ["stabilityai/sd-vae-ft-ema"] and autoencoder.describe(out).scale == (0.5,)


def test_without_a_network_the_hub_is_a_line(refuse, tmp_path, monkeypatch):
    def fail(name, **_):
        raise ConnectionError("no route to host\nat all")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    line = refuse(convert, "vae", tmp_path / "out", "--from_hub=a/b")
    assert "from_hub must be an autoencoder that can be downloaded, got a/b: no route to" in line
    assert list(tmp_path.iterdir()) == []


def test_what_differs_is_said_with_code_1(call, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(convert.parity, "VAE_TOLERANCES", {"moments": 1e-5, "decoded": 1e-12})
    code, out, _ = call(convert, "vae", folder, tmp_path / "out")
    assert code == 1 and "not the same: " in out and "more than 1e-12" in out


@pytest.mark.parametrize(
    "args, message",
    [
        (["/nowhere", "{out}"], "autoencoder must be a folder or a file that exists, got /nowh"),
        (["{folder}"], "vae takes DIR_OR_FILE OUT, got"),
        (["{empty}", "{out}"], "autoencoder must be a folder of diffusers' AutoencoderKL, got"),
        (["{half}", "{out}"], "must hold diffusion_pytorch_model.safetensors or diffusion_pyt"),
        (["{tanh}", "{out}"], "act_fn must be silu, got tanh"),
        (["{eight}", "{out}"], "latent_channels of config.json must be 4, got 8"),
        (["{dit}/x.safetensors", "{out}"], "must be of an AutoencoderKL: missing"),
        (["{folder}", "{out}.pt"], "output must be a folder, without .pt, got"),
        (["{folder}", "{folder}", "--overwrite"], "output must be apart from what is read"),
        (["{folder}", "{out}", "--weights=ema"], "vae takes --overwrite, --from_hub, got --wei"),
    ],
)
def test_wrong_use_is_one_line_and_nothing_is_left(
    refuse, folder, tmp_path_factory, tmp_path, args, message
):
    places = {
        name: tmp_path_factory.mktemp(name) for name in ("empty", "half", "tanh", "dit", "eight")
    }
    config = json.loads((folder / "config.json").read_text())
    (places["half"] / "config.json").write_text(json.dumps(config))
    (places["tanh"] / "config.json").write_text(json.dumps(config | {"act_fn": "tanh"}))
    (places["eight"] / "config.json").write_text(json.dumps(config | {"latent_channels": 8}))
    shutil.copy(folder / WEIGHTS, places["eight"])
    for name in ("tanh", "dit"):
        target = WEIGHTS if name == "tanh" else "x.safetensors"
        save_file({"a": torch.zeros(2)}, places[name] / target)
    args = [arg.format(folder=folder, out=tmp_path / "out", **places) for arg in args]
    assert message in refuse(convert, "vae", *args)
    assert list(tmp_path.iterdir()) == []


def test_an_autoencoder_is_no_dit(call, refuse, folder, tmp_path):
    done(call, "vae", folder, tmp_path / "vae")
    message = "checkpoint must be one of a DiT, got"
    assert message in refuse(convert, "to-torch", tmp_path / "vae", tmp_path / "x.pt")
