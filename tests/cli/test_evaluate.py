import json

import pytest
import random_run

from dit_jax.cli import evaluate


def test_judgments_are_printed_and_written(call, tmp_path):
    random_run.save(tmp_path)
    code, out, _ = call(evaluate, f"--checkpoint={tmp_path}")
    assert code == 0
    words = [line.split()[0] for line in out.splitlines()]
    assert words == ["agreement", "agreement", "Frechet", "distance"]
    receipt = json.loads((tmp_path / "judgments.json").read_text())
    assert receipt["samples"] == {"guided": 1000, "unguided": 1500}
    assert receipt["step"] == 30 and receipt["sampling"]["cfg_scale"] == 2.0
    # Random weights draw noise, and the judgments must show it.
    assert receipt["judgments"]["agreement"] < 0.5
    assert len(receipt["judgments"]["agreement_by_label"]) == 10
    assert receipt["judgments"]["frechet_distance"] > 5
    assert receipt["judgments"]["classifier_accuracy"] > 0.985


@pytest.mark.parametrize(
    "args, message",
    [
        (["--checkpoint=/nowhere"], "must be a directory with a saved step, got /nowhere"),
        (["--checkpoint={run}", "--out=no/where.json"], "out must be in a directory that exists"),
        (
            ["--checkpoint={run}", "--out=/proc/j.json"],
            "out must be where you may write, got /p",
        ),
        (["--checkpoint={run}", "--out={run}"], "out must be a file, got the directory"),
        (["--checkpoint={run}", "--out="], "out must not be empty"),
        (["--checkpoint={run}", "--out=README.md"], "out must end with .json, got README.md"),
        (["--checkpoint={run}", "--preset=paper-256"], "--inception must be given with --preset"),
        (["--checkpoint={run}", "--reference=x.npz"], "--inception must be given with --reference"),
        (["--checkpoint={run}", "--preset=table-2"], "preset must be one of paper-256, "),
        (["--checkpoint={run}", "--cfg_scale=-1"], "cfg_scale must be at least 0, got -1"),
        (["--checkpoint={run}", "--vae=nowhere"], "vae must be a"),
        ([], "--checkpoint must be given"),
        (
            ["{run}", "--num_samples=1000000000000"],
            "--num_samples must be a whole number in 6 .. 1",
        ),
        (["{run}", "--bootstrap=1000000000"], "--bootstrap must be a whole number in 0 .. 10000"),
        (["{run}", "--bootstrap=1"], "bootstrap must be 0 or in 2 .. 10000, got 1"),
        (["{run}", "--timed"], "--timed must be given with --sweep only"),
        (["{run}", "--size=64"], "--size must be given with --make_reference only"),
        (["{run}", "--num_samples=9", "--batch_size=4"], "--batch_size must be given for the judg"),
        (["{run}", "{run}", "--num_samples=9"], "out must not be a run, a checkpoint or the"),
        (["{run}", "{run}/checkpoints", "--seed=1", "--num_samples=9"], "out must not be a run"),
        (
            ["{run}", "--num_samples=9", "--fid_infinity"],
            "num_samples must be at least 5015 for fid",
        ),
        (["README.md", "out"], "samples must be a folder of images or an .npz"),
        (["--repeat=x.json", "a", "b"], "--repeat takes one new folder, got a and b"),
        (
            ["--repeat=x.json", "a", "--num_samples=9"],
            "--num_samples must not be given with --repe",
        ),
        (["--compare", "a", "a"], "--compare must be given each receipt once, got a, a"),
        (["--compare", "a", "b", "--seed=1"], "--seed must not be given with --compare"),
        (
            ["--study={run}", "--out=out", "--sweep=eta=0,1"],
            "--study must not be given with --sweep",
        ),
        (["--sweep=eta=0,0", "{run}"], "sweep must have each value once, got 'eta=0,0'"),
        (
            ["--sweep=eta=0,1", "--sweep=eta=1", "{run}"],
            "--sweep must be over two different options, got eta twice",
        ),
        (
            ["--sweep=eta=0,1", "--sweep=num_steps=4", "--sweep=sampler=ddim", "{run}"],
            "--sweep must be given once or twice, got it 3 times",
        ),
        (
            ["--sweep=sampler=ddim,ddpm", "--sweep=eta=0,1", "{run}", "--out={run}/new"],
            "eta must be left at 0 for ddpm, which does not use it, got 1.0",
        ),
        (
            ["--sweep=sampler=ddim", "--sweep=eta=0,1", "{run}", "--out={run}/new", "--eta=1"],
            "--eta must be left out with --sweep=eta=0,1, got both",
        ),
        (
            ["--sweep=eta=0,1", "{run}", "--out={run}/new", "--eta=1"],
            "--eta must be left out with --sweep=eta=0,1, got both",
        ),
        (
            ["--sweep=num_steps=4,5000", "{run}", "--out={run}/new"],
            "num_steps must be in 2 .. 1000, got '5000'",
        ),
    ],
)
def test_wrong_use_is_one_line(refuse, tmp_path, args, message):
    random_run.save(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert message in refuse(evaluate, *(arg.format(run=tmp_path) for arg in args))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_sweep_without_inception_is_over_runs_of_the_same_data(refuse, tmp_path):
    random_run.save(tmp_path / "a")
    random_run.save(tmp_path / "b")
    data = random_run.CONFIG["data"]
    random_run.save(tmp_path / "c", random_run.CONFIG | {"data": data | {"classes": [0, 1]}})
    flags = ["--sweep=cfg_scale=1,2", f"--out={tmp_path}/new"]
    line = refuse(evaluate, *flags, tmp_path / "a", tmp_path / "b", tmp_path / "c")
    assert f"must be over runs of the same data, got {tmp_path}/a and {tmp_path}/c" in line
    assert not (tmp_path / "new").exists()


def test_a_model_of_latents_needs_an_autoencoder(refuse, tmp_path):
    config = random_run.CONFIG | {"data": {"source": "latents", "space": "latents"}}
    random_run.save(tmp_path, config)
    line = refuse(evaluate, tmp_path)
    assert "--vae must be given for a model of latents" in line


def test_an_out_that_cannot_be_written_is_refused_before_sampling(refuse, tmp_path):
    random_run.save(tmp_path)
    (tmp_path / "judgments.json").mkdir()
    line = refuse(evaluate, f"--checkpoint={tmp_path}/checkpoints/30")  # the default is in the run
    assert f"out must be a file, got the directory {tmp_path}/judgments.json" in line
