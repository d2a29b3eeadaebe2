"""dit-convert from end to end: in, out, back, and what it refuses."""

import json

import jax
import numpy as np
import pytest
import random_run
import torch

import dit_jax
from dit_jax.cli import convert
from dit_jax.convert import files


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's directory and its average."""
    path = tmp_path_factory.mktemp("run")
    return path, random_run.save(path)[1]


def done(call, *args):
    """The output of a conversion that worked."""
    code, out, errors = call(convert, *args)
    assert code == 0, errors
    return out


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_out_to_the_official_code_and_back(call, tmp_path, run, suffix):
    path, ema = run
    out = tmp_path / f"digits{suffix}"
    assert "the same to" in done(call, "to-torch", path, out)
    report = json.loads((tmp_path / f"digits{suffix}.parity.json").read_text())
    assert report["passed"] and report["relative"] <= 2e-5
    assert [step["t"] for step in report["steps"]] == [0, 500, 999]
    assert report["files"]["to"] == files.digests(out)
    assert "meta/metadata" in report["files"]["from"]
    flags = ("--space=pixels", "--schedule=squared_cosine")
    assert "the same to" in done(call, "from-torch", out, tmp_path / "back", *flags)
    back = dit_jax.load(tmp_path / "back")
    jax.tree.map(np.testing.assert_array_equal, back.params, ema)
    assert back.config == dit_jax.load(path).config
    assert back.sample([3, 1], num_steps=3).dtype == np.uint8
    assert json.loads((tmp_path / "back" / "parity.json").read_text())["passed"]


def test_the_plain_parameters_can_be_asked_for(call, tmp_path, run):
    done(call, "to-torch", run[0], tmp_path / "a.pt")
    done(call, "to-torch", run[0], tmp_path / "b.pt", "--weights=params")
    a, b = (files.read_state_dict(tmp_path / name) for name in ("a.pt", "b.pt"))
    assert not np.array_equal(a["t_embedder.mlp.0.weight"], b["t_embedder.mlp.0.weight"])


def test_a_checkpoint_of_the_official_script(call, tmp_path, run):
    done(call, "to-torch", run[0], tmp_path / "a.pt")
    tensors = torch.load(tmp_path / "a.pt")
    twice = {name: 2 * x if name != "pos_embed" else x for name, x in tensors.items()}
    torch.save({"model": twice, "ema": tensors, "opt": {}}, tmp_path / "x.pt")
    done(call, "from-torch", tmp_path / "x.pt", tmp_path / "ema")
    done(call, "from-torch", tmp_path / "x.pt", tmp_path / "model", "--weights=model")
    table = ("y_embedder", "embedding_table", "embedding")
    a, b = (dit_jax.load(tmp_path / name).params for name in ("ema", "model"))
    for name in table:
        a, b = a[name], b[name]
    np.testing.assert_array_equal(2 * a, b)
    out = done(call, "inspect", tmp_path / "x.pt")
    assert "ema, model" in out and "Ti/4" in out


def test_out_to_diffusers_and_back(call, tmp_path, run):
    path, ema = run
    out = done(call, "to-diffusers", path, tmp_path / "pipeline")
    assert "plain diffusers is" in out and "the same to" in out
    out = done(call, "from-diffusers", tmp_path / "pipeline", tmp_path / "back")
    assert "the same to" in out
    jax.tree.map(np.testing.assert_array_equal, dit_jax.load(tmp_path / "back").params, ema)
    report = json.loads((tmp_path / "back" / "parity.json").read_text())
    assert report["plain_diffusers"] > 1e-3 and report["passed"]


def test_a_bundle(call, tmp_path, run):
    assert "the same to" in done(call, "to-torch", run[0], tmp_path / "out", "--bundle")
    assert (tmp_path / "out" / "parity.json").is_file()


def test_what_is_this(call, tmp_path, run):
    done(call, "to-torch", run[0], tmp_path / "a.safetensors")
    done(call, "to-torch", run[0], tmp_path / "bundle", "--bundle")
    done(call, "to-diffusers", run[0], tmp_path / "pipeline")
    formats = {
        run[0]: "dit_jax",
        tmp_path / "a.safetensors": "official state dict (.safetensors)",
        tmp_path / "bundle": "bundle for PyTorch",
        tmp_path / "pipeline": "diffusers",
    }
    for path, name in formats.items():
        fields = dict(line.split(None, 1) for line in done(call, "inspect", path).splitlines())
        assert fields["format"] == name and fields["variant"] == "Ti/4"
        assert fields["input_size"] == "(8, 8)" and fields["num_classes"] == "10"
    assert "30" in done(call, "inspect", run[0])


def test_an_output_that_differs_is_said_with_code_1(call, tmp_path, run, monkeypatch):
    monkeypatch.setattr(convert.parity, "TOLERANCE", 1e-12)
    code, out, _ = call(convert, "to-torch", run[0], tmp_path / "a.pt")
    assert code == 1 and "not the same: " in out and "more than 1e-12" in out


def test_without_pytorch_it_says_that_it_could_not_check(call, tmp_path, run, monkeypatch):
    monkeypatch.setattr(convert.importlib.util, "find_spec", lambda name: None)
    out = done(call, "to-torch", run[0], tmp_path / "a.safetensors")
    assert "not checked: PyTorch is missing. pip install dit_jax[convert]" in out
    assert (tmp_path / "a.safetensors").is_file()


@pytest.mark.parametrize(
    "args, message",
    [
        ([], "command must be one of from-torch, to-torch, from-diffusers, to-diffusers, inspect"),
        (["turn"], "got 'turn'"),
        (["from-torch", "a.pt"], "from-torch takes FILE OUT, got 'a.pt'"),
        (["from-torch", "/nowhere.pt", "{out}"], "FILE must be a file that exists, got /nowhere"),
        (["from-torch", "{run}/text.pt", "{out}"], "text.pt is not a whole PyTorch file"),
        (["from-torch", "{run}/other.pt", "{out}"], "must have the names of a DiT: missing"),
        (["from-torch", "{run}/other.pt", "{run}"], "output must not exist, or --overwrite"),
        (["from-torch", "{run}/text.txt", "{out}"], "file must end with .pt, .pth, .bin, .safe"),
        (["to-torch", "/nowhere", "{out}.pt"], "checkpoint must be a directory with a saved step"),
        (["to-torch", "{run}", "{out}"], "file must end with .pt, .pth, .bin, .safetensors, got"),
        (["to-torch", "{run}", "/no/where.pt"], "output must be in a directory that exists"),
        (["to-torch", "{run}", "{out}.pt", "--weights=model"], "weights must be ema or params"),
        (["to-diffusers", "{run}", "{out}", "--vae=/nowhere"], "vae must be a folder of diffusers"),
        (["from-diffusers", "{run}", "{out}"], "folder must hold a DiT of diffusers with its"),
        (["inspect", "{run}/half"], "bundle must have the config.json of dit-convert, got"),
        (["inspect", "/nowhere"], "checkpoint must be a directory with a saved step"),
    ],
)
def test_wrong_use_is_one_line_and_nothing_is_left(refuse, tmp_path, run, args, message):
    path, out = run[0], tmp_path / "out"
    torch.save({"a": torch.zeros(2)}, path / "other.pt")
    (path / "half").mkdir(exist_ok=True)
    for name in ("text.pt", "text.txt", "half/model.safetensors"):
        (path / name).write_text("text")
    assert message in refuse(convert, *(arg.format(run=path, out=out) for arg in args))
    assert list(tmp_path.iterdir()) == []
