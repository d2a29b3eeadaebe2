import json

import pytest
import receipts
import written_run

from dit_jax.errors import UserError
from dit_jax.machine import disk
from dit_jax.runs import summary

STARTED = written_run.STARTED


def state(path):
    return summary.read(path).state


@pytest.mark.parametrize(
    "last, expected",
    [
        ({"event": "finished", "step": 100}, "finished"),
        ({"event": "stopped", "step": 40}, "stopped at step 40"),
        ({"event": "diverged", "step": 1234}, "diverged at step 1,234"),
        ({"event": "failed", "step": 100}, "failed at step 100"),
        ({"event": "resumed", "step": 40}, "killed after step 100"),
    ],
)
def test_the_last_event_tells_the_state(tmp_path, last, expected):
    assert state(written_run.write(tmp_path / "run", events=[STARTED, last])) == expected


def test_a_run_whose_workdir_is_locked_is_running(tmp_path):
    run = written_run.write(tmp_path / "run", events=[STARTED])
    new = written_run.write(tmp_path / "new", [], events=[STARTED])
    with disk.locked(run, "workdir"), disk.locked(new, "workdir"):
        assert state(run) == "running" and state(new) == "starting"
    assert state(run) == "killed after step 100" and state(new) == "no step was logged yet"


def test_a_run_that_resumes_after_it_was_stopped_is_running(tmp_path):
    events = [STARTED, {"event": "stopped", "step": 40}, {"event": "resumed", "step": 40}]
    with disk.locked(run := written_run.write(tmp_path / "run", events=events), "workdir"):
        assert state(run) == "running"


def test_the_saved_steps_tell_the_state_of_a_run_without_history(tmp_path):
    done = written_run.write(tmp_path / "done")
    written_run.saved(done, 80, 100)
    cut = written_run.write(tmp_path / "cut")
    written_run.saved(cut, 80)
    assert state(done) == "finished" and state(cut) == "stopped at step 100"


def test_the_cost_counts_devices_and_repeated_steps(tmp_path):
    events = [
        STARTED,
        {"event": "resumed", "step": 40, "num_devices": 2, "devices": "2 x cpu", "lost": 15},
        {"event": "rolled back", "step": 70, "to": 60, "reason": "loss is nan"},
    ]
    cost = summary.read(written_run.write(tmp_path / "run", events=events)).cost
    assert cost.repeated == 15 + 10
    assert cost.flops == pytest.approx((100 + 25) * 4e12)
    assert cost.hours == pytest.approx(100 * 0.5 / 3600)
    assert cost.device_hours == pytest.approx((40 * 8 + 60 * 2) * 0.5 / 3600)


def test_device_hours_are_unknown_without_history(tmp_path):
    cost = summary.read(written_run.write(tmp_path / "run")).cost
    assert cost.device_hours is None and cost.flops == pytest.approx(100 * 4e12)


def test_a_run_without_a_step_has_no_cost_and_no_loss(tmp_path):
    run = summary.read(written_run.write(tmp_path / "run", []))
    assert (run.cost, run.loss, run.best, run.step) == (None, None, None, 0)


def test_the_best_score_is_of_receipts_then_of_the_record_then_of_judgments(tmp_path):
    path = written_run.write(tmp_path / "run", [10])
    judgments = {"step": 10, "judgments": {"agreement": 0.9, "agreement_by_label": [0.8, 1.0]}}
    (path / "judgments.json").write_text(json.dumps(judgments))
    assert str(summary.read(path).best) == "agreement with the label: 0.9 at step 10"
    written_run.write(path, [10, 20], frechet_distance=3.25, kid=0.1)
    best = str(summary.read(path).best)
    assert best == "Frechet distance (classifier features): 3.25 at step 10"
    for step, value in ((400, 9.0), (800, 7.5), (1200, 8.0)):
        receipts.write(
            path / "scores" / str(step) / "receipt.json", receipts.receipt(value=value, step=step)
        )
    run = summary.read(path)
    assert str(run.best) == "FID-50K (ADM): 7.5 at step 800"
    assert [file for file, _ in run.receipts] == [
        f"scores/{step}/receipt.json" for step in (400, 800, 1200)
    ]


def test_a_high_score_is_best_if_it_is_no_distance(tmp_path):
    path = written_run.write(tmp_path / "run")
    for step, value in ((400, 0.5), (800, 0.7), (1200, 0.6)):
        receipt = receipts.receipt(value=value, step=step, score="precision")
        receipts.write(path / "scores" / str(step) / "receipt.json", receipt)
    assert str(summary.read(path).best) == "precision: 0.7 at step 800"


@pytest.mark.parametrize(
    "name, text, problem",
    [
        ("config.json", "{", "config.json must be the config of a run, but it is damaged"),
        ("metrics.jsonl", '{"step": 1}\n', "metrics.jsonl must have the loss of step 1"),
        ("metrics.jsonl", "oops\n", "line 1 of "),
        ("init_from.json", "[", "init_from.json must be JSON, but it is damaged"),
        ("evaluation/receipt.json", "{", "receipt.json must be JSON, but it is damaged"),
        ("evaluation/receipt.json", '{"scores": {}}', "receipt.json must have samples and scores"),
        ("judgments.json", '{"step": 3}', "judgments.json must have judgments of a step"),
    ],
)
def test_a_damaged_file_is_one_problem_and_the_rest_is_read(tmp_path, name, text, problem):
    path = written_run.write(tmp_path / "run")
    written_run.saved(path, 100)
    (path / name).parent.mkdir(exist_ok=True)
    (path / name).write_text(text)
    (line,) = summary.read(path).problems
    assert problem in line and "\n" not in line


def test_a_folder_without_a_run_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match="WORKDIR must be a run of dit-train, got "):
        summary.read(tmp_path)


def test_steps_that_were_set_aside_have_the_time(tmp_path):
    path = written_run.write(tmp_path / "run")
    (path / "damaged" / "20-again").mkdir(parents=True)
    ((name, when),) = summary.read(path).aside
    assert name == "20-again" and when.endswith("+00:00")
