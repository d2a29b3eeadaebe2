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
    ],
)
def test_wrong_use_is_one_line(refuse, tmp_path, args, message):
    random_run.save(tmp_path)
    assert message in refuse(evaluate, *(arg.format(run=tmp_path) for arg in args))


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
