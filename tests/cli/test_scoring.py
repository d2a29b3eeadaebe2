"""Scores in training: on one process and on two, stopped and resumed, and when they are refused."""

import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import processes
import pytest
from PIL import Image

from configs import digits as digits_config
from dit_jax.checkpoint import steps, store
from dit_jax.cli import train
from dit_jax.evals import classifier
from dit_jax.runs import build, record, run, scoring

ROOT = Path(__file__).parents[2]
OPTIONS = (
    "--config=configs/digits.py:Pi/4",
    "--config.train.batch_size=16",
    "--config.train.warmup_steps=0",
    "--config.train.decay_steps=0",
    "--config.sampling.num_steps=ddim4",
    "--config.run.total_steps=12",
    "--config.run.log_every=5",
    "--config.run.checkpoint_every=4",
    "--config.run.sample_every=100",
    "--config.run.num_samples=4",
    "--config.run.score_every=4",
    "--config.run.score_samples=40",
    "--config.run.keep_checkpoints=1",
    "--config.run.keep_best=1",
    "--config.run.keep_best_by=score",
)
QUICK = """
from dit_jax.cli import train
from dit_jax.evals import classifier
classifier.NUM_STEPS = (20, 20)
train.entry()
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """A classifier of 20 steps; returns the list of the fits."""
    fits, fit = [], classifier.fit

    def counted(*args, **options):
        fits.append(1)
        return fit(*args, **options)

    monkeypatch.setattr(classifier, "NUM_STEPS", (20, 20))
    monkeypatch.setattr(classifier, "fit", counted)
    return fits


def read_settings(**fields):
    config = digits_config.get_config("Pi/4")
    with config.unlocked():
        for option in OPTIONS[1:]:
            name, _, value = option.removeprefix("--config.").partition("=")
            topic, _, field = name.partition(".")
            config[topic][field] = type(config[topic][field])(value)
    settings = build.read(config)
    return dataclasses.replace(settings, run=dataclasses.replace(settings.run, **fields))


def train_until(workdir, step, **fields):
    """Trains in this process; a signal comes in that step, None: never."""
    calls = []

    def stop_requested():
        calls.append(1)
        start = steps_before
        return step is not None and start + len(calls) >= step

    steps_before = steps.latest(workdir / "checkpoints") or 0
    with jax.numpy_dtype_promotion("standard"):  # optax's Adam mixes types
        run.run(read_settings(**fields), workdir, lambda: stop_requested)


def read_scores(workdir):
    records = record.read(workdir / "metrics.jsonl")
    return {
        each["step"]: [each[name] for name in record.SCORES if name in each] for each in records
    }


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("scored") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classifier, "NUM_STEPS", (20, 20))
        train_until(workdir, None)
    return workdir


def test_scores_are_in_the_record_in_the_checkpoints_and_in_a_plot(undisturbed):
    found = read_scores(undisturbed)
    assert list(found) == [4, 5, 8, 10, 12]  # logs of steps 5 and 10 have none
    assert [len(found[step]) for step in found] == [2, 0, 2, 0, 2]
    assert all(found[step][0] > 0 for step in (4, 8, 12))
    directory = undisturbed / "checkpoints"
    best = min((4, 8, 12), key=lambda step: found[step][0])
    assert steps.saved(directory) == sorted({best, 12})
    meta = store.read_meta(directory, 12)
    assert [meta["frechet_distance"], meta["kid"]] == found[12] and "loss" in meta
    with Image.open(undisturbed / "scores.png") as image:
        assert image.width > image.height > 200
    kept = classifier.load(undisturbed / "evaluation" / "classifier")
    assert kept.about["num_train"] == 1350


@pytest.mark.slow
@pytest.mark.parametrize("stops", [(4, 5), (6, 8)])
def test_a_stopped_run_repeats_and_loses_no_score(undisturbed, tmp_path, quick, stops):
    """Also if it stops in a step that is due, which it then scores when it is resumed."""
    for step in stops:
        with pytest.raises(run.Stopped, match=f"stopped after step {step}"):
            train_until(tmp_path / "run", step)
    train_until(tmp_path / "run", None)
    expected = read_scores(undisturbed)
    found = {step: scores for step, scores in read_scores(tmp_path / "run").items() if scores}
    assert found == {step: expected[step] for step in (4, 8, 12)}
    assert len(quick) == 1  # the others opened the classifier that was kept


@pytest.mark.slow  # the test before this one resumes from a step whose scores are missing too
def test_a_run_that_turns_scores_on_scores_the_step_that_it_resumes_from(undisturbed, tmp_path):
    with pytest.raises(run.Stopped):
        train_until(tmp_path / "run", 8, score_every=0, keep_best_by="loss")
    assert not (tmp_path / "run" / "evaluation").exists()
    train_until(tmp_path / "run", None, keep_best_by="loss")
    expected = read_scores(undisturbed)
    found = {step: scores for step, scores in read_scores(tmp_path / "run").items() if scores}
    assert found == {step: expected[step] for step in (8, 12)}


def test_a_damaged_classifier_is_fitted_anew_and_a_full_disk_ends_nothing(
    undisturbed, tmp_path, quick, monkeypatch, caplog
):
    workdir = shutil.copytree(undisturbed, tmp_path / "run")
    shutil.rmtree(workdir / "evaluation" / "classifier" / "0" / "params")

    def fail(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(classifier.Classifier, "save", fail)
    train_until(workdir, None, total_steps=16)
    assert len(quick) == 1 and 16 in read_scores(workdir)
    assert "the classifier is fitted anew: checkpoint" in caplog.text
    assert "classifier could not be saved: No space left on device" in caplog.text


def test_samples_that_are_not_finite_are_a_warning(undisturbed, tmp_path, monkeypatch, caplog):
    workdir = shutil.copytree(undisturbed, tmp_path / "run")
    sample = scoring.generate.run

    def broken(generated, ema, *args, **options):
        nan = jax.tree.map(lambda x: x * np.float32(np.nan), ema)
        return sample(generated, nan, *args, **options)

    monkeypatch.setattr(scoring.generate, "run", broken)
    train_until(workdir, None, total_steps=16)
    assert read_scores(workdir)[16] == []
    assert "samples of step 16 could not be scored: samples must be finite" in caplog.text


@pytest.mark.slow
def test_two_processes_score_together(tmp_path):
    address, workdir = processes.free_address(), tmp_path / "run"
    workers = [
        subprocess.Popen(
            [*(sys.executable, "-c", QUICK, *OPTIONS, f"--workdir={workdir}"), *flags],
            cwd=ROOT,
            env=processes.environment(2),
            stderr=subprocess.PIPE,
            text=True,
        )
        for flags in (processes.flags(address, 2, i) for i in range(2))
    ]
    errors = [worker.communicate(timeout=300)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], errors
    found = read_scores(workdir)
    assert [step for step, scores in found.items() if scores] == [4, 8, 12]
    assert "fitted a classifier to 1350 images" in errors[0]
    assert "classifier" not in errors[1]
    meta = store.read_meta(workdir / "checkpoints", 12)
    assert [meta["frechet_distance"], meta["kid"]] == found[12]
    assert classifier.load(workdir / "evaluation" / "classifier").about["seed"] == 0


LATENTS = ("--config=configs/imagenet256.py:Pi/2", "--config.data.source=synthetic")


@pytest.mark.parametrize(
    "options, message",
    [
        (
            (*LATENTS, "--config.run.score_every=5"),
            "run.score_every must be 0 for this run, got 5: data.vae must be given to compare ",
        ),
        (
            (*OPTIONS, "--config.data.classes=3", "--config.model.num_classes=1"),
            "run.score_every must be 0 for this run, got 4: a classifier needs 2 classes or more",
        ),
        (
            (*OPTIONS, "--config.run.score_every=0"),
            "run.keep_best_by must be loss if run.score_every is 0, got 'score'",
        ),
        ((*OPTIONS, "--config.run.score_every=-1"), "run.score_every must be at least 0, got -1"),
    ],
)
def test_scores_that_cannot_be_had_are_refused_before_training(call, tmp_path, options, message):
    code, _, errors = call(train, *options, f"--workdir={tmp_path / 'run'}")
    assert code == 2 and message in errors and errors.count("\n") == 1
    assert not (tmp_path / "run").exists()
