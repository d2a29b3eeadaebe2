import json
import sys

import jax
import numpy as np
import pytest

from dit_jax.cli import bench
from dit_jax.convert import torch_peer
from dit_jax.models import vae
from dit_jax.runs import bench_vae
from dit_jax.sampling import autoencoder

NARROW = vae.VAEConfig(channels=(8, 16), num_resnets=1, num_groups=4)
CONFIG = ("configs/imagenet256.py:Pi/2", "--config.model.input_size=(4,6)", "--repeats=2")
SMALL = (*CONFIG, "--config.train.batch_size=8", "--warmup=1")


def read(call, out, *args):
    code, printed, errors = call(bench, *args, f"--out={out}")
    assert code == 0, errors
    figures = json.loads(out.read_text())
    assert all(name in printed for name in figures)
    assert figures["images_per_second"] == pytest.approx(8 / figures["seconds_median"])
    assert figures["compile_seconds"] > 0 and figures["batch_size"] == 8
    return figures


def test_a_random_autoencoder_is_measured_where_there_is_none(call, tmp_path, monkeypatch):
    monkeypatch.setattr(bench_vae, "RANDOM", NARROW)
    monkeypatch.setattr("torch.compile", lambda apply: apply)  # compiling takes minutes
    flags = ("--config.model.in_channels=6", "--peer")
    figures = read(call, tmp_path / "out.json", "decode", *SMALL, *flags)
    assert figures["autoencoder"] == "random" and figures["latent_channels"] == 6
    assert figures["image_size"] == [8, 12] and figures["dtype"] == "float32"
    for name in ("torch", "torch_compile"):
        ratio = figures[f"{name}_seconds_median"] / figures["seconds_median"]
        assert figures[f"dit_jax_over_{name}"] == pytest.approx(ratio)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["encode", "decode"])
def test_the_autoencoder_of_the_config_is_measured(call, tmp_path, monkeypatch, what):
    monkeypatch.setattr("torch.compile", lambda apply: apply)  # compiling takes minutes
    path = tmp_path / "vae"
    init = jax.jit(vae.init, static_argnums=0)
    autoencoder.save(path, NARROW, init(NARROW, jax.random.key(0)))
    flags = (f"--config.data.vae={path}", "--config.data.vae_dtype=bfloat16", "--peer")
    figures = read(call, tmp_path / "out.json", what, *SMALL, *flags)
    assert figures["autoencoder"] == str(path) and figures["dtype"] == "bfloat16"
    assert figures["torch_images_per_second"] > 0


def test_pytorch_does_the_same_work():
    options = {"size": (8, 12), "batch_size": 2, "dtype": "float32", "compiled": False}
    moments = torch_peer.make_autoencoder(NARROW, "encode", **options)()
    assert moments.shape == (2, 8, 4, 6)
    images = torch_peer.make_autoencoder(NARROW, "decode", **options)().numpy()
    assert images.shape == (2, 3, 8, 12) and images.dtype == np.uint8 and images.std() > 1


@pytest.mark.parametrize(
    "args, message",
    [
        (["encode", "configs/digits.py"], "data.space must be latents to encode, got pixels"),
        (["decode", *SMALL, "--config.model.input_size=(4,)"], "the height and width to decode"),
        (
            ["decode", *SMALL, "--config.data.vae=/nowhere"],
            "data.vae must be a folder that `dit-convert vae`",
        ),
        (["encode", *SMALL, "--config.train.batch_size=6"], "train.batch_size must be divisible"),
        (["encode", *SMALL, "--sweep"], "sweep must be false for encode"),
    ],
)
def test_wrong_use_is_one_line(refuse, args, message):
    assert message in refuse(bench, *args)


def test_a_missing_diffusers_is_one_line(refuse, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers.models", None)
    line = refuse(bench, "encode", *SMALL, "--peer")
    assert line.endswith("diffusers.models must be installed: pip install dit_jax[convert]")
