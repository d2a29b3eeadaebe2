"""dit-train --init_from, with frozen parameters."""

import functools
import json
import logging

import jax
import numpy as np
import pytest
import random_run
import small_run

import dit_jax
from dit_jax.checkpoint import store
from dit_jax.cli import train
from dit_jax.models import dit

DIGITS = (
    "--config=configs/digits.py:Xs/4",
    "--config.train.batch_size=16",
    "--config.train.warmup_steps=0",
    "--config.train.decay_steps=0",
    "--config.sampling.num_steps=ddim2",
    "--config.run.log_every=2",
    "--config.run.sample_every=100",
    "--config.run.num_samples=4",
)
FOUR = ("--config.data.classes=(0, 1, 2, 3)", "--config.model.num_classes=4")
FROZEN = ("--config.train.frozen=blocks/attn", "--config.train.frozen=^x_embedder")


@pytest.fixture(autouse=True)
def small_size(monkeypatch):
    monkeypatch.setitem(dit.SIZES, "Xs", (2, 16, 2))


def to_step(step):
    return f"--config.run.total_steps={step}"


def test_a_run_starts_from_another_and_resumes_bit_identically(call, refuse, caplog, tmp_path):
    caplog.set_level(logging.INFO)
    model = dit.configure("Xs", 4, input_size=(8, 8), in_channels=1, num_classes=4)
    config = random_run.CONFIG | {
        "data": {"source": "digits", "space": "pixels", "classes": [0, 1, 2, 3]}
    }
    _, ema = random_run.save(tmp_path / "old", config, model=model)
    options = (*DIGITS, *FROZEN, f"--init_from={tmp_path}/old")

    def train_to(step, name):
        with jax.numpy_dtype_promotion("standard"):  # optax's Adam mixes types
            code, _, errors = call(train, *options, f"--workdir={tmp_path}/{name}", to_step(step))
        assert code == 0, errors

    train_to(2, "new")
    assert f"starting from step 30 of {tmp_path}/old (ema):" in caplog.text
    assert "label table: 4 labels taken, 0 left out, 6 new from the null label" in caplog.text
    assert "parameters are frozen: blocks/attn/proj/bias, " in caplog.text
    train_to(4, "new")
    assert f"init_from is ignored: {tmp_path}/new has started from it already" in caplog.text
    assert f"resuming {tmp_path}/new from step 2" in caplog.text
    train_to(4, "whole")
    assert small_run.digests(tmp_path / "new", 4) == small_run.digests(tmp_path / "whole", 4)
    origin = json.loads((tmp_path / "new" / "init_from.json").read_text())
    assert origin["path"] == f"{tmp_path}/old" and origin["step"] == 30
    assert store.read_meta(tmp_path / "new" / "checkpoints", 4)["init_from"] == origin
    trained = dit_jax.load(tmp_path / "new").params
    for part in ("blocks", "t_embedder"):
        for path, x in jax.tree.leaves_with_path(ema[part]):
            ours = functools.reduce(lambda tree, key: tree[key.key], path, trained[part])
            assert np.array_equal(x, ours) == (path[0].key == "attn"), path
    line = refuse(train, *options, f"--init_from={tmp_path}/whole", f"--workdir={tmp_path}/new")
    assert f"init_from must be left out, or workdir be another: the run in {tmp_path}/new " in line


@pytest.mark.parametrize(
    "args, message",
    [
        ([*DIGITS, "--init_from={tmp}"], "init_from must be a run of dit-train or a checkpoint of"),
        ([*DIGITS, "--init_from="], "init_from must not be empty"),
        (
            [*DIGITS, "--config.train.frozen=atn"],
            "train.frozen must match parameters, got 'atn', w",
        ),
        ([*DIGITS, "--config.train.frozen=."], "train.frozen must leave a parameter to train, got"),
        (
            [*DIGITS, "--config.train.frozen='('"],
            "train.frozen must be a list of regular expressions",
        ),
        ([*DIGITS, *FOUR[:1]], "model.num_classes must be 4 for digits, got 10"),
        (
            [*DIGITS, "--config.data.classes=1,1"],
            "data.classes must be different digits in 0 .. 9,",
        ),
        ([*DIGITS, "--config.data.classes=10"], "be different digits in 0 .. 9, got (10,)"),
        (
            [*DIGITS, "--config.data.classes=1.5"],
            "data.classes must be a list of whole numbers of at",
        ),
        (
            ["--config=configs/imagenet256.py:S/8", "--config.data.source=synthetic", FOUR[0]],
            "data.classes must be () for synthetic, got (0, 1, 2, 3)",
        ),
    ],
)
def test_wrong_use_is_one_line_and_writes_nothing(refuse, tmp_path, args, message):
    args = [arg.format(tmp=tmp_path) for arg in args]
    assert message in refuse(train, *args, f"--workdir={tmp_path}/new")
    assert not (tmp_path / "new").exists()
