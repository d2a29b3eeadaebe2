"""dit-convert from end to end: conversions, round trips, and wrong use."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
import random_run
import safetensors.torch
import torch

import dit_jax
from dit_jax.cli import convert
from dit_jax.convert import commands, files, native, torch_dit
from dit_jax.settings import SIT, Diffusion

NAMES = list("abcdefghij")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Saves a run; returns its directory and its EMA."""
    path = tmp_path_factory.mktemp("run")
    return path, random_run.save(path, class_names=NAMES)[1]


@pytest.fixture(scope="module")
def nan(run):
    """Returns the state dict of the EMA with one NaN."""
    model, _, params = native.read(run[0])
    state_dict = torch_dit.to_official(params, model)
    state_dict["blocks.2.mlp.fc1.bias"][3] = np.nan
    return {name: torch.from_numpy(x) for name, x in state_dict.items()}


def convert_ok(call, *args):
    """Runs a conversion that must succeed; returns its output."""
    code, out, errors = call(convert, *args)
    assert code == 0, errors
    return out


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_round_trip_through_the_official_format(call, tmp_path, run, suffix):
    path, ema = run
    out = tmp_path / f"digits{suffix}"
    assert "passed: relative error" in convert_ok(call, "to-torch", path, out)
    report = json.loads((tmp_path / f"digits{suffix}.parity.json").read_text())
    assert report["passed"] and report["relative"] <= 2e-5
    assert [step["t"] for step in report["steps"]] == [0, 500, 999]
    assert report["files"]["to"] == files.digests(out)
    assert "meta/metadata" in report["files"]["from"]
    flags = ("--space=pixels", "--schedule=squared_cosine")
    assert "passed: relative error" in convert_ok(
        call, "from-torch", out, tmp_path / "back", *flags
    )
    back = dit_jax.load(tmp_path / "back")
    jax.tree.map(np.testing.assert_array_equal, back.params, ema)
    assert back.config == dit_jax.load(path).config
    assert back.sample([3, 1], num_steps=3).dtype == np.uint8
    assert json.loads((tmp_path / "back" / "parity.json").read_text())["passed"]


def test_weights_flag_selects_the_trained_parameters(call, tmp_path, run):
    convert_ok(call, "to-torch", run[0], tmp_path / "a.pt")
    convert_ok(call, "to-torch", run[0], tmp_path / "b.pt", "--weights=params")
    a, b = (files.read_state_dict(tmp_path / name) for name in ("a.pt", "b.pt"))
    assert not np.array_equal(a["t_embedder.mlp.0.weight"], b["t_embedder.mlp.0.weight"])


def test_checkpoint_of_the_official_script_is_converted(call, tmp_path, run):
    convert_ok(call, "to-torch", run[0], tmp_path / "a.pt")
    tensors = torch.load(tmp_path / "a.pt")
    twice = {name: 2 * x if name != "pos_embed" else x for name, x in tensors.items()}
    torch.save({"model": twice, "ema": tensors, "opt": {}}, tmp_path / "x.pt")
    (tmp_path / "names.txt").write_text("\n".join(NAMES))
    names = f"--class_names={tmp_path}/names.txt"
    convert_ok(call, "from-torch", tmp_path / "x.pt", tmp_path / "ema")
    convert_ok(call, "from-torch", tmp_path / "x.pt", tmp_path / "model", "--weights=model", names)
    assert native.read_meta(tmp_path / "model")["class_names"] == NAMES
    assert "class_names" not in native.read_meta(tmp_path / "ema")
    table = ("y_embedder", "embedding_table", "embedding")
    a, b = (dit_jax.load(tmp_path / name).params for name in ("ema", "model"))
    for name in table:
        a, b = a[name], b[name]
    np.testing.assert_array_equal(2 * a, b)
    out = convert_ok(call, "inspect", tmp_path / "x.pt")
    assert "ema, model" in out and "Ti/4" in out


@pytest.mark.parametrize(
    "suffix, dtype",
    [(".pt", "float16"), (".safetensors", "bfloat16"), (".ckpt", "float64")],
)
def test_other_types_become_float32_and_pass_the_check(
    call, monkeypatch, tmp_path, run, suffix, dtype
):
    """Half precision rounds the position table of the file; ours is exact."""
    model, _, params = native.read(run[0])
    arrays = torch_dit.to_official(params, model)
    tensors = {k: torch.from_numpy(x).to(getattr(torch, dtype)) for k, x in arrays.items()}
    path = tmp_path / f"x{suffix}"
    (torch.save if suffix != ".safetensors" else safetensors.torch.save_file)(tensors, path)
    assert dtype in convert_ok(call, "inspect", path)
    lines = []
    monkeypatch.setattr(commands.logging, "info", lambda text, *args: lines.append(text % args))
    assert "passed: relative error" in convert_ok(call, "from-torch", path, tmp_path / "out")
    how = "rounded" if dtype == "float64" else "without loss"
    assert f"arrays of {dtype} become float32, {how}" in lines
    bias = dit_jax.load(tmp_path / "out").params["final_layer"]["linear"]["bias"]
    np.testing.assert_array_equal(bias, tensors["final_layer.linear.bias"].float())


def test_sharded_state_dict_is_converted(call, tmp_path, run):
    convert_ok(call, "to-torch", run[0], tmp_path / "a.pt")
    tensors, names = torch.load(tmp_path / "a.pt"), {}
    for i, name in enumerate(tensors):
        names[name] = f"model-{i % 2}.safetensors"
    for file in set(names.values()):
        part = {name: tensors[name] for name in names if names[name] == file}
        safetensors.torch.save_file(part, tmp_path / file)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": names}))
    assert "official state dict (sharded)" in convert_ok(call, "inspect", index)
    convert_ok(call, "from-torch", index, tmp_path / "out")
    report = json.loads((tmp_path / "out" / "parity.json").read_text())
    assert report["passed"] and len(report["files"]["from"]) == 3
    jax.tree.map(np.testing.assert_array_equal, dit_jax.load(tmp_path / "out").params, run[1])


@pytest.fixture(scope="module")
def sit(run, tmp_path_factory):
    """Writes the file of a SiT, whose training leaves the rows of the variance at 0."""
    model, _, params = native.read(run[0])
    tensors = {k: torch.from_numpy(x) for k, x in torch_dit.to_official(params, model).items()}
    tensors["final_layer.linear.weight"].view(16, 2, 1, 128)[:, 1] = 0  # patch 4, one channel
    path = tmp_path_factory.mktemp("sit") / "x.pt"
    torch.save(tensors, path)
    return path


def test_sit_is_named_and_is_never_sampled_as_a_dit(call, refuse, caplog, tmp_path, sit):
    out = tmp_path / "out"
    fields = convert_ok(call, "inspect", sit)
    assert "velocity (its variance has weights of 0)" in fields
    assert "passed: relative error" in convert_ok(call, "from-torch", sit, out, "--space=pixels")
    assert "this is a SiT (its variance has weights of 0; --prediction=noise for" in caplog.text
    assert "prediction       velocity" in convert_ok(call, "inspect", out)
    message = "process must be ddpm and predict noise for {}, got velocity on linear"
    assert message.format("a bundle") in refuse(
        convert, "to-torch", out, tmp_path / "b", "--bundle"
    )
    assert message.format("diffusers") in refuse(convert, "to-diffusers", out, tmp_path / "d")
    convert_ok(call, "to-torch", out, tmp_path / "back.pt")  # which SiT's sample.py opens
    assert "velocity (by the args in" in convert_ok(call, "inspect", tmp_path / "back.pt")
    assert {path.name for path in tmp_path.iterdir()} == {"out", "back.pt", "back.pt.parity.json"}


def test_prediction_flag_overrules_the_file(call, tmp_path, run, sit):
    convert_ok(call, "from-torch", sit, tmp_path / "a", "--prediction=noise")
    assert dit_jax.load(tmp_path / "a").settings.diffusion.prediction == "noise"
    convert_ok(call, "to-torch", run[0], tmp_path / "x.pt")
    convert_ok(call, "from-torch", tmp_path / "x.pt", tmp_path / "b", "--prediction=velocity")
    assert native.describe(tmp_path / "b")[1].diffusion == Diffusion(**SIT)


def test_round_trip_through_diffusers(call, tmp_path, run):
    path, ema = run
    out = convert_ok(call, "to-diffusers", path, tmp_path / "pipeline")
    assert "uncorrected diffusers: relative error" in out and "passed: relative error" in out
    out = convert_ok(call, "from-diffusers", tmp_path / "pipeline", tmp_path / "back")
    assert "passed: relative error" in out
    back = dit_jax.load(tmp_path / "back")
    jax.tree.map(np.testing.assert_array_equal, back.params, ema)
    assert back.class_names == tuple(NAMES)
    report = json.loads((tmp_path / "back" / "parity.json").read_text())
    assert report["plain_diffusers"] > 1e-3 and report["passed"]


def test_bundle_is_written(call, tmp_path, run):
    assert "passed: relative error" in convert_ok(
        call, "to-torch", run[0], tmp_path / "out", "--bundle"
    )
    assert (tmp_path / "out" / "parity.json").is_file()


def test_inspect_names_every_format(call, tmp_path, run):
    convert_ok(call, "to-torch", run[0], tmp_path / "a.safetensors")
    convert_ok(call, "to-torch", run[0], tmp_path / "bundle", "--bundle")
    convert_ok(call, "to-diffusers", run[0], tmp_path / "pipeline")
    formats = {
        run[0]: "dit_jax",
        tmp_path / "a.safetensors": "official state dict (.safetensors)",
        tmp_path / "bundle": "bundle for PyTorch",
        tmp_path / "pipeline": "diffusers",
    }
    for path, name in formats.items():
        fields = dict(
            line.split(None, 1) for line in convert_ok(call, "inspect", path).splitlines()
        )
        assert fields["format"] == name and fields["variant"] == "Ti/4"
        assert fields["input_size"] == "(8, 8)" and fields["num_classes"] == "10"
    assert "30" in convert_ok(call, "inspect", run[0])


def test_failed_parity_check_exits_with_1_and_keeps_the_output(call, tmp_path, run, monkeypatch):
    monkeypatch.setattr(commands.parity, "TOLERANCE", 1e-12)
    code, out, _ = call(convert, "to-torch", run[0], tmp_path / "a.pt")
    assert code == 1 and "failed: relative error " in out and "tolerance 1e-12" in out
    report = tmp_path / "a.pt.parity.json"
    assert f"{tmp_path}/a.pt was written for inspection" in out
    assert (tmp_path / "a.pt").is_file() and json.loads(report.read_text())["passed"] is False


def test_failed_parity_check_never_overwrites(call, tmp_path, run, monkeypatch):
    convert_ok(call, "to-torch", run[0], tmp_path / "a.pt")
    before = files.digests(tmp_path)
    monkeypatch.setattr(commands.parity, "TOLERANCE", 1e-12)
    options = ("--overwrite", "--weights=params")
    code, out, _ = call(convert, "to-torch", run[0], tmp_path / "a.pt", *options)
    assert code == 1 and f"{tmp_path}/a.pt is unchanged" in out
    assert files.digests(tmp_path) == before


def test_closed_stdout_keeps_output_and_report(tmp_path, run):
    """The output and its report are moved to their path before anything is printed."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "dit_jax.cli.convert", "to-torch", run[0], tmp_path / "a.pt"]
    code = subprocess.run(command, stdout=write, stderr=subprocess.DEVNULL).returncode
    os.close(write)
    report = json.loads((tmp_path / "a.pt.parity.json").read_text())
    assert code == 141 and report["files"]["to"] == files.digests(tmp_path / "a.pt")


def test_sigterm_leaves_no_output(tmp_path, run):
    command = [sys.executable, "-m", "dit_jax.cli.convert", "to-torch", run[0], tmp_path / "a.pt"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:
            if line.startswith("writing"):
                process.terminate()
    assert line == "dit-convert: interrupted\n"
    assert process.returncode == 130 and list(tmp_path.iterdir()) == []


def test_output_that_is_not_finite_fails_the_check(call, tmp_path, run):
    convert_ok(call, "to-torch", run[0], tmp_path / "a.pt")
    tensors = torch.load(tmp_path / "a.pt")
    tensors["blocks.0.mlp.fc1.weight"] *= 1e38  # finite weights, infinite outputs
    torch.save(tensors, tmp_path / "big.pt")
    code, out, _ = call(convert, "from-torch", tmp_path / "big.pt", tmp_path / "big")
    assert code == 1 and "failed: relative error not finite" in out
    report = json.loads((tmp_path / "big" / "parity.json").read_text(), parse_constant=pytest.fail)
    assert report["relative"] is None and report["passed"] is False


def test_guessed_settings_are_logged(call, tmp_path, run, monkeypatch):
    lines = []
    monkeypatch.setattr(commands.logging, "info", lambda text, *args: lines.append(args))
    convert_ok(call, "to-torch", run[0], tmp_path / "a.pt")
    convert_ok(call, "from-torch", tmp_path / "a.pt", tmp_path / "back", "--num_heads=8")
    schedule = "a linear schedule (--schedule)"
    assert (8, 10, " and a null label", "latents", schedule, "noise", "none") in lines
    assert dit_jax.load(tmp_path / "back").config.num_heads == 8


def test_bundle_round_trip_keeps_the_settings(call, tmp_path, run):
    path, ema = run
    convert_ok(call, "to-torch", path, tmp_path / "b", "--bundle")
    convert_ok(call, "from-torch", tmp_path / "b" / "model.safetensors", tmp_path / "back")
    back, expected = dit_jax.load(tmp_path / "back"), dit_jax.load(path)
    assert back.sampling == expected.sampling and back.space == expected.space == "pixels"
    np.testing.assert_array_equal(back.sample([3, 1], seed=4), expected.sample([3, 1], seed=4))
    flags = ("--space=latents",)
    convert_ok(
        call, "from-torch", tmp_path / "b" / "model.safetensors", tmp_path / "latents", *flags
    )
    assert dit_jax.load(tmp_path / "latents").space == "latents"


def test_without_pytorch_the_check_is_skipped_with_a_message(call, tmp_path, run, monkeypatch):
    monkeypatch.setattr(commands.importlib.util, "find_spec", lambda name: None)
    out = convert_ok(call, "to-torch", run[0], tmp_path / "a.safetensors")
    assert "not checked: PyTorch or diffusers is missing. Run pip install dit_jax[convert]" in out
    report = json.loads((tmp_path / "a.safetensors.parity.json").read_text())
    assert report["passed"] is None and report["files"]["to"].keys() == {"a.safetensors"}
    convert_ok(call, "to-torch", run[0], tmp_path / "b", "--bundle")
    convert_ok(call, "to-torch", run[0], tmp_path / "b", "--bundle", "--overwrite")


@pytest.mark.parametrize(
    "args, message",
    [
        (
            [],
            "must be one of from-torch, to-torch, from-diffusers, to-diffusers, vae, inception",
        ),
        (["turn"], "got 'turn'"),
        (["from-torch", "a.pt"], "from-torch takes FILE OUT, got 'a.pt'"),
        (["from-torch", "/nowhere.pt", "{out}"], "FILE must exist, got /nowhere.pt"),
        (["from-torch", "", "{out}"], "FILE must not be empty"),
        (["from-torch", "{run}", "{out}"], ": use to-torch or to-diffusers"),
        (["from-torch", "{run}/half", "{out}"], "half: use {run}/half/model.safetensors"),
        (["from-torch", "{run}/text.pt", "{out}"], "text.pt is truncated or not a PyTorch file"),
        (["from-torch", "{run}/nan.pt", "{out}"], "blocks.2.mlp.fc1.bias must be finite, got NaN"),
        (
            ["from-torch", "{run}/nan.pt", "{out}", "--num_heads=-4"],
            "num_heads must be a whole number of at least 1, got -4",
        ),
        (
            ["from-torch", "{run}/nan.pt", "{out}.pt"],
            "output must be a folder name without .pt, got",
        ),
        (
            ["from-torch", "{run}/nan.pt", "{out}", "--weights=ema"],
            "weights must not be given for a file with one set",
        ),
        (
            ["from-torch", "{run}/nan.pt", "{out}", "--vae=x"],
            "from-torch takes --overwrite, --weigh",
        ),
        (
            ["from-torch", "{run}/nan.pt", "{out}", "--class_names=imagenet"],
            "class_names must have 10 names, one for each class, got 1,000 in imagenet",
        ),
        (
            ["from-torch", "{run}/nan.pt", "{out}", "--class_names=/nowhere.txt"],
            "class_names must exist, got /nowhere.txt",
        ),
        (["to-torch", "{run}", "{out}.pt", "--class_names=imagenet"], "got --class_names"),
        (["from-torch", "{run}/other.pt", "{out}"], "must have the names of a DiT: missing"),
        (["from-torch", "{run}/other.pt", "{run}/empty"], "output must not exist unless --over"),
        (["from-torch", "{run}/text.txt", "{out}"], "file must end with .pt, .pth, .bin, .ckpt"),
        (
            ["from-torch", "{run}/nan.pt", "{out}", "--prediction=v"],
            "prediction must be one of noise, velocity, got 'v'",
        ),
        (["to-torch", "/nowhere", "{out}.pt"], "checkpoint must be a directory with a saved step"),
        (["to-torch", "{run}", "{out}"], ".bin, .ckpt, .safetensors, or --bundle must be"),
        (
            ["to-torch", "{run}", "{out}.zip"],
            "file must end with .pt, .pth, .bin, .ckpt, .safetensors, got",
        ),
        (
            ["to-torch", "{run}", "{out}.pt", "--bundle"],
            "output must be a folder name without .pt, got",
        ),
        (["to-torch", "{run}", "{out}.pt", "--space=pixels"], "--bundle, got --space"),
        (["to-torch", "{run}", "{run}", "--bundle", "--overwrite"], "must be separate from the"),
        (["to-torch", "{run}", "/no/where.pt"], "output must be in an existing directory"),
        (["to-torch", "{run}", "{out}.pt", "--weights=model"], "weights must be ema or params"),
        (["to-diffusers", "{run}", "{out}", "--vae=/nowhere"], "vae must exist, got /nowhere"),
        (["to-diffusers", "{run}", "{out}.pt"], "output must be a folder name without .pt, got"),
        (
            ["from-diffusers", "{run}", "{out}"],
            "folder must contain a diffusers DiT, got no config",
        ),
        (["from-diffusers", "/nowhere", "{out}"], "DIR must exist, got /nowhere"),
        (["inspect", "{run}/half"], "bundle must contain the config.json of dit-convert, got"),
        (
            ["from-torch", "{run}/half", "{out}", "--num_heads=four"],
            "num_heads must be a whole num",
        ),
        (["inspect", "{run}/empty"], "FILE_OR_DIR must be a state dict, a run, a converted check"),
        (["inspect", "{run}/text.txt"], "file must end with .pt, .pth, .bin, .ckpt, .safetens"),
        (["inspect", "{run}/text.pt"], "text.pt is truncated or not a PyTorch file"),
        (
            ["inspect", "{run}", "--overwrite"],
            "inspect takes --num_heads, --num_classes, got --over",
        ),
        (["inspect", "/nowhere"], "FILE_OR_DIR must exist, got /nowhere"),
    ],
)
def test_wrong_use_prints_one_line_and_leaves_no_output(refuse, tmp_path, run, nan, args, message):
    path, out = run[0], tmp_path / "out"
    torch.save({"a": torch.zeros(2)}, path / "other.pt")
    torch.save(nan, path / "nan.pt")
    for name in ("half", "empty"):
        (path / name).mkdir(exist_ok=True)
    for name in ("text.pt", "text.txt", "half/model.safetensors", "half/dit.py"):
        (path / name).write_text("text")
    assert message.format(run=path) in refuse(
        convert, *(arg.format(run=path, out=out) for arg in args)
    )
    assert list(tmp_path.iterdir()) == []
