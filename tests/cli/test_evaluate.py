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
        (["--checkpoint={latents}"], "checkpoint must be of a model of digits so far, got one of"),
        (
            ["--checkpoint={latents}", "--out=no/where.json"],
            "out must be in a directory that exists",
        ),
        (["--checkpoint={latents}", "--out={latents}"], "out must be a file, got the directory"),
        (["--checkpoint={latents}", "--out="], "out must not be empty"),
        ([], "--checkpoint must be given"),
    ],
)
def test_wrong_use_is_one_line(refuse, tmp_path, args, message):
    config = random_run.CONFIG | {"data": {"source": "imagenet", "space": "latents"}}
    random_run.save(tmp_path, config)
    assert message in refuse(evaluate, *(arg.format(latents=tmp_path) for arg in args))


def test_an_out_that_cannot_be_written_is_refused_before_sampling(refuse, tmp_path):
    random_run.save(tmp_path)
    (tmp_path / "judgments.json").mkdir()
    line = refuse(evaluate, f"--checkpoint={tmp_path}/checkpoints/30")  # the default is in the run
    assert f"out must be a file, got the directory {tmp_path}/judgments.json" in line
