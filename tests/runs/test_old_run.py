"""A run that commit c5da217 wrote still opens, samples and resumes with the same numbers.

testdata/old_run.tar.gz holds run/, a workdir of digits with 8 steps; samples.npz, which that commit
drew from it; and expected.json, the losses of that run taken on to step 16 by that commit.
"""

import dataclasses
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

import dit_jax
from dit_jax import settings as settings_lib
from dit_jax.models import dit
from dit_jax.runs import own_config, record
from dit_jax.runs import workdir as workdirs

ROOT = Path(__file__).parents[2]
SIZE = (2, 16, 2)  # depth, hidden size, heads: small, so that the file is
TRAIN = f"""
from dit_jax.cli import train
from dit_jax.models import dit
dit.SIZES["Xs"] = {SIZE}
train.entry()
"""
OPTIONS = (
    "--config=configs/digits.py:Xs/2",
    "--config.train.batch_size=16",
    "--config.train.warmup_steps=4",
    "--config.train.decay_steps=16",
    "--config.run.log_every=1",
    "--config.run.checkpoint_every=8",
    "--config.run.sample_every=16",
    "--config.run.num_samples=4",
    "--config.sampling.num_steps=ddim5",
    "--config.run.total_steps=16",
)


@pytest.fixture(autouse=True)
def small_size(monkeypatch):
    monkeypatch.setitem(dit.SIZES, "Xs", SIZE)


@pytest.fixture
def old(tmp_path):
    """The unpacked file."""
    with tarfile.open(ROOT / "tests" / "testdata" / "old_run.tar.gz") as file:
        file.extractall(tmp_path, filter="data")
    return tmp_path


def resume(workdir):
    """Trains the run to step 16, on one device as before, and returns stderr."""
    command = [sys.executable, "-c", TRAIN, *OPTIONS, f"--workdir={workdir}"]
    done = subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr


def edit(path, change):
    """Rewrites a JSON file with change(fields) applied."""
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields))


def drop_later_fields(config):
    """Removes fields of which this run had the defaults: as if they had been added later."""
    del config["sampling"]["cfg_interval"], config["train"]["ema_warmup"], config["mesh"]


def drop_from_meta(meta):
    drop_later_fields(meta["config"])
    del meta["sha256"]  # which would no longer fit


@pytest.mark.parametrize(
    "name, options",
    [
        ("ddim", {}),
        ("ddpm", {"sampler": "ddpm", "num_steps": 10}),
        ("eta", {"sampler": "ddim", "num_steps": 10, "eta": 0.5, "cfg_scale": 3}),
    ],
)
def test_samples_of_an_old_run_are_unchanged(old, name, options):
    dit = dit_jax.load(old / "run")
    assert dit.class_names == ()  # it has none
    images = dit.sample(range(10), **options)
    with np.load(old / "samples.npz") as file:
        expected = file[name]
    assert images.shape == expected.shape and images.dtype == expected.dtype
    difference = np.abs(images.astype(int) - expected)
    # Equal where the file was made; another CPU or jax sums in another order and may round a
    # pixel differently.
    assert difference.max() <= 1 and np.mean(difference > 0) <= 0.01


@pytest.mark.slow  # the next test resumes it too, with fewer fields
def test_an_old_run_resumes_with_the_same_losses(old):
    assert f"resuming {old}/run from step 8" in resume(old / "run")
    check_losses(old)


def check_losses(old):
    """Expects the losses of the run to be those that the old commit went on with."""
    metrics = ("step", "loss", "grad_norm")
    lines = [[line[name] for name in metrics] for line in record.read(old / "run/metrics.jsonl")]
    expected = json.loads((old / "expected.json").read_text())["losses"]
    np.testing.assert_allclose(lines, expected, rtol=1e-5)


def test_an_old_run_without_later_fields_opens_and_resumes(old):
    meta = old / "run/checkpoints/8/meta/metadata"
    edit(old / "run/config.json", drop_later_fields)
    edit(meta, drop_from_meta)
    assert dit_jax.load(old / "run").sampling["cfg_interval"] == (0, 999)
    assert f"resuming {old}/run from step 8" in resume(old / "run")
    check_losses(old)


def test_a_field_that_is_added_to_the_settings_gets_its_default(old, monkeypatch):
    train = dataclasses.make_dataclass(
        "Train", [("added", int, 7)], bases=(settings_lib.Train,), frozen=True
    )
    settings = dataclasses.make_dataclass(
        "Settings", [("train", train, train())], bases=(settings_lib.Settings,), frozen=True
    )
    monkeypatch.setattr(settings_lib, "Settings", settings)
    read = own_config.read_settings(old / "run")
    assert read.train.added == 7 and read.train.batch_size == 16
    workdirs.check(old / "run", read)
    assert dit_jax.load(old / "run").settings.train.added == 7
