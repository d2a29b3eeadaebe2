"""dit-convert vae from end to end: folders, files, the hub, and wrong use."""

import json
import shutil

import diffusers
import jax
import numpy as np
import pytest
import stable_diffusion
import torch
from safetensors.torch import load_file, save_file

from dit_jax.cli import convert
from dit_jax.convert import commands, torch_vae
from dit_jax.sampling import autoencoder

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Writes a small random AutoencoderKL with 32 groups, like Stable Diffusion's."""
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


def convert_ok(call, *args):
    code, out, errors = call(convert, *args)
    assert code == 0, errors
    return out


def test_folder_is_converted_and_checked(call, folder, tmp_path):
    assert "passed: relative error" in convert_ok(call, "vae", folder, tmp_path / "out")
    report = json.loads((tmp_path / "out" / "parity.json").read_text())
    assert [part["part"] for part in report["parts"]] == ["moments", "decoded"]
    assert report["passed"] and report["parts"][0]["relative"] <= 1e-5
    assert WEIGHTS in report["files"]["from"]
    model = autoencoder.load(tmp_path / "out")
    assert model.config.scale == (0.5,) and model.config.channels == (32, 32)
    state_dict = load_file(folder / WEIGHTS)
    for name, x in torch_vae.to_torch(jax.device_get(model.params)).items():
        np.testing.assert_array_equal(x, state_dict[name])
    fields = convert_ok(call, "inspect", tmp_path / "out")
    assert "autoencoder of dit_jax" in fields and "(32, 32)" in fields
    assert "autoencoder of diffusers" in convert_ok(call, "inspect", folder)


@pytest.mark.parametrize("name", [pytest.param("x.safetensors", marks=pytest.mark.slow), "x.bin"])
def test_file_without_config_is_assumed_to_be_stable_diffusions(
    call, caplog, folder, tmp_path, name
):
    tensors = load_file(folder / WEIGHTS)
    (save_file if name.endswith("tensors") else torch.save)(tensors, tmp_path / name)
    assert "passed: relative error" in convert_ok(call, "vae", tmp_path / name, tmp_path / "out")
    assert "no config.json: assuming Stable Diffusion's autoencoder, 32 groups" in caplog.text
    assert autoencoder.load(tmp_path / "out").config.scale == (0.18215,)


class Callback:
    """Lightning saves the state of its callbacks under their classes."""


@pytest.mark.parametrize(
    "name, prefix, dtype",
    [
        pytest.param("vae.ckpt", "", torch.float32, marks=pytest.mark.slow),
        ("sd.ckpt", "first_stage_model.", torch.float16),
        pytest.param(
            *("sd.safetensors", "first_stage_model.", torch.bfloat16), marks=pytest.mark.slow
        ),
    ],
)
def test_original_file_of_stable_diffusion_is_converted(
    call, caplog, folder, monkeypatch, tmp_path, name, prefix, dtype
):
    expected = {k: x.to(dtype) for k, x in load_file(folder / WEIGHTS).items()}
    tensors = stable_diffusion.original(expected, prefix=prefix)
    if prefix:  # a whole Stable Diffusion
        tensors["model.diffusion_model.out.2.bias"] = torch.zeros(4)
    else:
        tensors["loss.logvar"] = torch.zeros(())
    path = tmp_path / name
    if path.suffix == ".ckpt":
        torch.save({"state_dict": tensors, "callbacks": {Callback: Callback()}}, path)
    else:
        save_file({k: x.contiguous() for k, x in tensors.items()}, path)
    fields = convert_ok(call, "inspect", path)
    assert f"autoencoder with the names of Stable Diffusion ({path.suffix})" in fields
    assert str(dtype).removeprefix("torch.") in fields and "(32, 32)" in fields
    lines = []
    monkeypatch.setattr(commands.logging, "info", lambda text, *args: lines.append(text % args))
    assert "passed: relative error" in convert_ok(call, "vae", path, tmp_path / "out")
    assert "assuming Stable Diffusion's autoencoder, 32 groups" in caplog.text
    said = f"arrays of {str(dtype)[6:]} become float32, without loss"
    assert (said in lines) == (dtype != torch.float32)
    model = autoencoder.load(tmp_path / "out")
    assert model.config.scale == (0.18215,)
    for key, x in torch_vae.to_torch(jax.device_get(model.params)).items():
        np.testing.assert_array_equal(x, expected[key].float())


def test_file_of_diffusers_is_inspected(call, folder):
    """The config.json beside it gives the scale."""
    fields = convert_ok(call, "inspect", folder / WEIGHTS)
    assert "autoencoder with the names of diffusers (.safetensors)" in fields
    assert "(0.5,)" in fields


def test_config_of_another_model_beside_a_file_is_not_used(call, folder, tmp_path):
    shutil.copy(folder / WEIGHTS, tmp_path / "x.safetensors")
    other = {"_class_name": "UNet2DConditionModel", "norm_num_groups": 8, "act_fn": "gelu"}
    (tmp_path / "config.json").write_text(json.dumps(other))
    assert "(0.18215,)" in convert_ok(call, "inspect", tmp_path / "x.safetensors")


def test_from_hub_downloads_and_converts(call, folder, tmp_path, monkeypatch):
    requested = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda name, **_: requested.append(name) or str(folder)
    )
    out = tmp_path / "out"
    assert "passed: relative error" in convert_ok(
        call, "vae", out, "--from_hub=stabilityai/sd-vae-ft-ema"
    )
    assert requested == ["stabilityai/sd-vae-ft-ema"] and autoencoder.describe(out).scale == (0.5,)


def test_failed_download_prints_one_line(refuse, tmp_path, monkeypatch):
    def fail(name, **_):
        raise ConnectionError("no route to host\nat all")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    line = refuse(convert, "vae", tmp_path / "out", "--from_hub=a/b")
    assert "from_hub must be an autoencoder that can be downloaded, got a/b: no route to" in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow  # test_convert.py has a fast one, of a DiT
def test_failed_parity_check_exits_with_1(call, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(commands.parity, "VAE_TOLERANCES", {"moments": 1e-5, "decoded": 1e-12})
    code, out, _ = call(convert, "vae", folder, tmp_path / "out")
    assert code == 1 and "failed: relative error " in out and "tolerance 1e-12" in out


@pytest.mark.parametrize(
    "args, message",
    [
        (["/nowhere", "{out}"], "DIR_OR_FILE must exist, got /nowhere"),
        (["{folder}"], "vae takes DIR_OR_FILE OUT, got"),
        (["{empty}", "{out}"], "autoencoder must be a diffusers AutoencoderKL, got"),
        (["{half}", "{out}"], "must contain diffusion_pytorch_model.safetensors or diffusion"),
        (["{tanh}", "{out}"], "act_fn must be silu, got tanh"),
        (["{eight}", "{out}"], "latent_channels of config.json must be 4, got 8"),
        (["{dit}/x.safetensors", "{out}"], "must be an AutoencoderKL: missing"),
        (["{half}/config.json", "{out}"], "file must end with .pt, .pth, .bin, .ckpt, .safetens"),
        (["{folder}", "{out}.pt"], "output must be a folder name without .pt, got"),
        (["{folder}", "{folder}", "--overwrite"], "output must be separate from the input"),
        (["{folder}", "{out}", "--weights=ema"], "vae takes --overwrite, --from_hub, got --wei"),
    ],
)
def test_wrong_use_prints_one_line_and_leaves_no_output(
    refuse, folder, tmp_path_factory, tmp_path, args, message
):
    folders = {
        name: tmp_path_factory.mktemp(name) for name in ("empty", "half", "tanh", "dit", "eight")
    }
    config = json.loads((folder / "config.json").read_text())
    (folders["half"] / "config.json").write_text(json.dumps(config))
    (folders["tanh"] / "config.json").write_text(json.dumps(config | {"act_fn": "tanh"}))
    (folders["eight"] / "config.json").write_text(json.dumps(config | {"latent_channels": 8}))
    shutil.copy(folder / WEIGHTS, folders["eight"])
    for name in ("tanh", "dit"):
        target = WEIGHTS if name == "tanh" else "x.safetensors"
        save_file({"a": torch.zeros(2)}, folders[name] / target)
    args = [arg.format(folder=folder, out=tmp_path / "out", **folders) for arg in args]
    assert message in refuse(convert, "vae", *args)
    assert list(tmp_path.iterdir()) == []


def test_to_torch_refuses_an_autoencoder(call, refuse, folder, tmp_path):
    convert_ok(call, "vae", folder, tmp_path / "vae")
    message = "checkpoint must be one of a DiT, got"
    assert message in refuse(convert, "to-torch", tmp_path / "vae", tmp_path / "x.pt")
