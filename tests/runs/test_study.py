import dataclasses
import json
import shutil

import pytest
from receipts import FID, PAPER, receipt, write

from dit_jax import settings as settings_lib
from dit_jax.cli import evaluate
from dit_jax.errors import UserError
from dit_jax.runs import study

STEPS = (1000, 2000)
DESIGNS = {"in_context": 35.24, "cross_attention": 26.14, "adaln": 25.21}


def make_settings(model="XL/2", seed=0, **fields):
    """Settings with other values of TOPIC_FIELDs."""
    size, patch = model.split("/")
    settings = dataclasses.replace(settings_lib.Settings(), seed=seed)
    fields |= {"model_size": size, "model_patch_size": int(patch)}
    for name, value in fields.items():
        topic, _, field = name.partition("_")
        changed = dataclasses.replace(getattr(settings, topic), **{field: value})
        settings = dataclasses.replace(settings, **{topic: changed})
    return settings


def make_run(path, model, design="adaln_zero", *, gflops, value, batch_size=256, **more):
    """A run with its settings, its record of losses and scores at STEPS.

    more: speed, in images per second, the seed and other fields.
    """
    speed = {"images_per_second": more.pop("speed")} if "speed" in more else {}
    more |= {"model_conditioning": design, "train_batch_size": batch_size}
    path.mkdir(parents=True)
    text = json.dumps(settings_lib.to_json(make_settings(model, **more)))
    (path / "config.json").write_text(text)
    lines = [{"step": 50 * i, "loss": 0.5 + 1 / i, **speed} for i in range(1, 41)]
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


@pytest.fixture
def repeated(tmp_path):
    """One model with and without weight decay, the latter at twice the speed, three seeds each."""
    for decay, speed, fids in ((0.0, 256, (20, 22, 24)), (0.1, 512, (10, 11, 15))):
        for seed, fid in enumerate(fids):
            fields = {"seed": seed, "speed": speed, "train_weight_decay": decay}
            make_run(tmp_path / f"{decay}-{seed}", "XL/2", gflops=118, value=fid, **fields)
    return tmp_path


def test_runs_that_differ_in_the_seed_are_one_row_with_a_deviation(repeated):
    text = study.report(repeated, repeated / "plots")
    lines = text.splitlines()
    assert "not comparable" not in text
    assert [line.split()[1] for line in lines[2:4]] == ["weight_decay=0.0", "weight_decay=0.1"]
    assert lines[2].endswith(" 22 +- 2 of 3 seeds") and lines[3].endswith(" 12 +- 2.6 of 3 seeds")
    names = {"designs_XL-2.png", "time_XL-2.png", "study.json"}
    assert {path.name for path in (repeated / "plots").iterdir()} == names
    rows = json.loads((repeated / "plots" / "study.json").read_text())["runs"]
    assert [(row["score"], row["seeds"]) for row in rows] == [(22, 3), (12, 3)]


def test_designs_are_timed_until_they_are_as_good_as_the_reference(repeated):
    text = study.report(repeated, repeated / "plots")
    found = json.loads((repeated / "plots" / "study.json").read_text())
    assert found["reference"] == "weight_decay=0.0"
    slow, fast = found["races"]
    assert (slow["until_step"], slow["until_seconds"], slow["seconds"]) == (2000, 2000, 2000)
    # At steps 1000 and 2000 its means are 24 and 12, and the reference ends with 22.
    assert fast["until_step"] == pytest.approx(1000 + 1000 / 6)
    assert fast["until_seconds"] == pytest.approx(fast["until_step"] / 2)
    assert "XL/2, until the score is 22, that of weight_decay=0.0 at step 2000:" in text
    row = next(line for line in text.splitlines() if line.startswith("weight_decay=0.1"))
    assert row.split()[1:] == ["16.7", "1,167", "9.72", "-"]  # minutes, steps, minutes, agreement


def test_the_reference_is_chosen_by_its_name(call, repeated):
    flags = [f"--study={repeated}", f"--out={repeated}/plots"]
    code, text, errors = call(evaluate, *flags, "--reference=weight_decay=0.1")
    assert (code, errors) == (0, "") and "until the score is 12, that of weight_decay=0.1" in text
    slow = next(line for line in text.splitlines() if line.startswith("weight_decay=0.0"))
    assert slow.split()[2:4] == ["-", "-"]  # it never is
    code, _, errors = call(evaluate, *flags, "--reference=adaln")
    line = "reference must be one of weight_decay=0.0; weight_decay=0.1, got 'adaln'"
    assert (code, errors) == (2, f"dit-evaluate: {line}\n")


def test_times_on_other_machines_do_not_compare(repeated):
    for name, devices in (("0.0-0", "1 x cpu"), ("0.1-0", "1 x TPU v4")):
        event = {"time": "2026-11-28", "event": "started", "step": 0, "devices": devices}
        (repeated / name / "history.jsonl").write_text(json.dumps(event) + "\n")
    text = study.report(repeated, repeated / "plots")
    assert "times do not compare: trained on 1 x TPU v4, 1 x cpu" in text


def test_designs_are_named_by_the_values_that_are_not_the_default_ones():
    settings = [
        make_settings(),
        make_settings(seed=7, sampling_sampler="ddim", run_total_steps=9, data_path="elsewhere"),
        make_settings(train_b1=0.5),
        make_settings(train_b1=0.5, model_conditioning="adaln", diffusion_num_steps=500),
    ]
    shown = study.shown_fields(settings)
    assert shown == ["model.conditioning", "diffusion.num_steps", "train.b1"]
    names = [study.design(each, shown) for each in settings]
    default, same, *others = names
    assert default == same == study.DEFAULT
    assert others == ["b1=0.5", "adaln, diffusion.num_steps=500, b1=0.5"]  # sampling has one too


def test_a_value_that_follows_from_another_is_no_part_of_a_name():
    """A path predicts the velocity and learns no variance unless a config says so."""
    objectives = [
        {},
        {"prediction": "v"},
        {"prediction": "x0", "weight": "min_snr"},
        {"process": "linear"},
        {"process": "linear", "time": "logit_normal", "prediction": "noise"},
    ]
    settings = [settings_lib.read({"diffusion": fields}) for fields in objectives]
    shown = study.shown_fields(settings)
    assert [study.design(each, shown) for each in settings] == [
        study.DEFAULT,
        "prediction=v",
        "prediction=x0, weight=min_snr",
        "process=linear",
        "prediction=noise, process=linear, time=logit_normal",
    ]


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda path: shutil.rmtree(path), "study must be a folder of runs with scores/STEP/"),
        (
            lambda path: shutil.copytree(path / "S-8", path / "copy"),
            "study must have one run of a model, design and seed, got S-8 and copy, which are both "
            "S/8 adaln_zero, seed 0",
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
