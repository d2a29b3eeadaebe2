"""A run with run.loggers: TensorBoard and Weights & Biases get what metrics.jsonl gets."""

import importlib.util
import shutil

import numpy as np
import pytest
import small_run
import wandb_files
from tensorboard.backend.event_processing import event_accumulator

from dit_jax.cli import train
from dit_jax.runs import record

BOTH = "--config.run.loggers=tensorboard", "--config.run.loggers=wandb"
EVERYTHING = {"images": 0, "scalars": 0, "tensors": 0}  # to be read, instead of some of it
EVERY = "--config.run.checkpoint_every=4", "--config.run.sample_every=4"
LOGGED = (*small_run.SHORT, *BOTH, *EVERY)


@pytest.mark.slow  # runs/test_loggers.py checks the loggers, and test_report.py one with a run
def test_a_resumed_run_gives_loggers_every_step_once(call, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    workdir = tmp_path / "run"
    usual = (*LOGGED, f"--workdir={workdir}")
    assert call(train, *usual, "--config.run.total_steps=8")[0] == 0
    shutil.rmtree(workdir / "checkpoints" / "8")  # as one that was killed after it saved step 4
    assert call(train, *usual, "--config.run.total_steps=12")[0] == 0
    assert len(list(workdir.glob("wandb/offline-run-*"))) == 2
    lines = record.read(workdir / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 13))
    events = event_accumulator.EventAccumulator(str(workdir / "tensorboard"), EVERYTHING)
    events.Reload()
    for name in ("loss", "mse", "vb", "grad_norm", "data_wait"):
        found = [(each.step, each.value) for each in events.Scalars(name)]
        assert found == [(line["step"], np.float32(line[name])) for line in lines], name
    assert [each.step for each in events.Images("samples")] == [4, 8, 12]
    rows = wandb_files.history(workdir / "wandb")
    assert [row["_step"] for row in rows] == list(range(1, 13))
    for name in ("loss", "mse", "vb", "grad_norm"):  # the times of steps that were repeated differ
        assert [row[name] for row in rows] == [line[name] for line in lines], name
    sampled = [row["_step"] for row in rows if any("samples" in key for key in row)]
    assert sampled == [4, 8, 12]


def test_a_logger_that_is_not_installed_is_told_before_training(refuse, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    line = refuse(train, *LOGGED, f"--workdir={tmp_path}/run")
    assert line.endswith(
        "run.loggers must be installed, got 'tensorboard': pip install dit_jax[tensorboard]"
    )
    assert not (tmp_path / "run").exists()
