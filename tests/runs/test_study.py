import dataclasses
import json
import shutil

import pytest
from receipts import FID, PAPER, receipt, write

from dit_jax import settings as settings_lib
from dit_jax.errors import UserError
from dit_jax.runs import study

STEPS = (1000, 2000)
DESIGNS = {"in_context": 35.24, "cross_attention": 26.14, "adaln": 25.21}


def make_run(path, model, design="adaln_zero", *, gflops, value, batch_size=256):
    """A run with its settings, its record of losses and scores at STEPS."""
    settings = settings_lib.Settings()
    size, patch = model.split("/")
    fields = {"size": size, "patch_size": int(patch), "conditioning": design}
    settings = dataclasses.replace(
        settings,
        model=dataclasses.replace(settings.model, **fields),
        train=dataclasses.replace(settings.train, batch_size=batch_size),
    )
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(settings_lib.to_json(settings)))
    lines = [{"step": 50 * i, "loss": 0.5 + 1 / i} for i in range(1, 41)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for step in STEPS:
        given = receipt(model, gflops=gflops, value=value * STEPS[-1] / step, step=step)
        write(path / "scores" / str(step) / "receipt.json", given)


@pytest.fixture
def workdir(tmp_path):
    """Four models of the paper and the other designs of one of them, with their real scores."""
    for model in ("S/8", "S/2", "XL/8", "XL/2"):
        gflops, fid = PAPER[model]
        make_run(tmp_path / model.replace("/", "-"), model, gflops=gflops, value=fid)
    for design, fid in DESIGNS.items():
        make_run(tmp_path / f"XL-2-{design}", "XL/2", design, gflops=118.5, value=fid)
    (tmp_path / "plots").mkdir()
    return tmp_path


def test_a_study_has_a_table_the_correlation_and_all_pictures(workdir):
    text = study.report(workdir, workdir / "plots")
    lines = text.splitlines()
    assert lines[0] == "step 2000, 50000 samples of each model"
    models = [line.split()[:2] for line in lines[2:9]]
    assert models[0] == ["S/8", "adaln_zero"] and models[-1] == ["XL/2", "adaln_zero"]
    assert {tuple(each) for each in models} >= {("XL/2", design) for design in DESIGNS}
    assert "correlation of log Gflops and score: -0.95" in text  # of these four
    assert "score ~ Gflops^-0.35" in text and study.PAPER in text
    files = {path.name for path in (workdir / "plots").iterdir()}
    assert files == {
        *("model_compute.png", "training_compute.png", "training.png", "losses.png"),
        *("designs_XL-2.png", "study.json"),
    }
    found = json.loads((workdir / "plots" / "study.json").read_text())
    assert found["score"] == FID and found["step"] == 2000 and len(found["runs"]) == 7
    assert found["trend"]["correlation"] == pytest.approx(-0.95, abs=0.005)
    last = found["runs"][-1]
    assert (last["model"], last["gflops"], last["score"]) == ("XL/2", 118.64, 19.47)
    assert last["loss"] == pytest.approx(0.525, abs=0.002)


def test_a_study_of_designs_alone_has_their_picture_only(workdir):
    for model in ("S-8", "S-2", "XL-8"):
        shutil.rmtree(workdir / model)
    assert "correlation" not in study.report(workdir, workdir / "new" / "plots")
    files = {path.name for path in (workdir / "new" / "plots").iterdir()}
    assert files == {"designs_XL-2.png", "study.json"}


def test_a_run_without_scores_is_left_out_and_named(workdir):
    shutil.rmtree(workdir / "S-2" / "scores")
    text = study.report(workdir, workdir / "plots")
    assert "without scores, left out: S-2" in text and "S/2 " not in text


def test_a_step_that_is_not_yet_scored_everywhere_is_not_compared(workdir):
    shutil.rmtree(workdir / "S-2" / "scores" / "2000")
    assert study.report(workdir, workdir / "plots").startswith("step 1000, ")


def test_runs_that_were_trained_otherwise_are_named(workdir):
    shutil.rmtree(workdir / "S-8")
    make_run(workdir / "S-8", "S/8", gflops=0.36, value=153, batch_size=64)
    text = study.report(workdir, workdir / "plots")
    assert "not comparable: the runs differ in train.batch_size" in text


def test_another_score_can_be_asked_for(workdir):
    for path in workdir.glob("*/scores/*/receipt.json"):
        given = json.loads(path.read_text())
        given["scores"]["recall"] = {"value": 0.5, "deviation": 0.01}
        path.write_text(json.dumps(given))
    text = study.report(workdir, workdir / "plots", score="recall")
    assert text.splitlines()[1].endswith("recall") and "0.5 +- 0.01" in text


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda path: shutil.rmtree(path), "study must be a folder of runs with scores/STEP/"),
        (
            lambda path: shutil.copytree(path / "S-8", path / "copy"),
            "study must have one run of a model and a design, got S-8 and copy, which are both S/8",
        ),
        (
            lambda path: (path / "S-8" / "metrics.jsonl").write_text(""),
            "S-8/metrics.jsonl must have a record of the losses, got none",
        ),
        (
            lambda path: write(path / "S-8/scores/1000/receipt.json", {"samples": {"file": "x"}}),
            "S-8/scores/1000/receipt.json must be a receipt of a checkpoint, got one without model",
        ),
        (
            lambda path: write(path / "S-8/scores/1000/receipt.json", receipt(step=None)),
            "receipt.json must be a receipt of a checkpoint, got one without samples.step",
        ),
        (
            lambda path: write(
                path / "S-8/scores/1000/receipt.json", receipt() | {"model": {"gflops": "few"}}
            ),
            "receipt.json must be a receipt of a checkpoint, got one without model.gflops",
        ),
        (
            lambda path: write(path / "S-8/scores/1000/receipt.json", receipt(value="low")),
            "FID-50K .* of a receipt must have a number as value, got .*S-8/scores/1000/receipt",
        ),
        (
            lambda path: write(path / "S-8/scores/1000/receipt.json", receipt(count=10)),
            "receipts must have the same count, got ",
        ),
    ],
)
def test_what_cannot_be_compared_is_one_line_and_draws_nothing(workdir, spoil, message):
    spoil(workdir)
    with pytest.raises(UserError, match=message) as error:
        study.report(workdir, workdir / "out")
    assert "\n" not in str(error.value)
    assert not (workdir / "out").exists()
