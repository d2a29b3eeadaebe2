import json

import pytest
import written_run

from dit_jax.runs import history


def test_a_start_and_a_resume_name_the_devices_and_the_lost_steps(tmp_path):
    history.start(tmp_path, 0)
    written_run.write(tmp_path, range(10, 61, 10))
    history.start(tmp_path, 40)
    started, resumed = history.read(tmp_path)
    assert (started["event"], started["step"], started["lost"]) == ("started", 0, 0)
    assert (resumed["event"], resumed["step"], resumed["lost"]) == ("resumed", 40, 20)
    assert resumed["devices"] == "8 x cpu" and resumed["num_devices"] == 8
    assert history.describe(started) == "started at step 0 on 8 x cpu"
    assert history.describe(resumed) == (
        "resumed from step 40 on 8 x cpu; 20 steps after it had been lost and were repeated"
    )


def test_the_time_is_in_utc(tmp_path):
    history.add(tmp_path, "finished", 3)
    assert history.read(tmp_path)[0]["time"].endswith("+00:00")


def test_a_line_that_was_cut_off_is_left_out_and_the_next_event_is_kept(tmp_path):
    history.add(tmp_path, "started", 0)
    with (tmp_path / history.FILE).open("a") as file:
        file.write('{"time": "2026", "event": "rolled back", "step": 3}\n{"time": "2026-11-')
    history.add(tmp_path, "finished", 9)
    assert [each["event"] for each in history.read(tmp_path)] == ["started", "finished"]


def test_a_history_that_cannot_be_written_is_only_warned_of(tmp_path, caplog):
    history.add(tmp_path / "missing", "stopped", 3)
    assert "history.jsonl could not be written" in caplog.text


def test_a_run_of_an_older_version_has_no_history(tmp_path):
    assert history.read(tmp_path) == []


@pytest.mark.parametrize(
    "event, text",
    [
        (
            {"event": "rolled back", "step": 1234, "to": 1200, "reason": "loss is nan"},
            "diverged at step 1,234 and went back to step 1,200, skipping 34 batches: loss is nan",
        ),
        ({"event": "finished", "step": 9, "reason": None}, "finished at step 9"),
        ({"event": "stopped", "step": 9}, "stopped on request at step 9"),
        (
            {"event": "diverged", "step": 9, "reason": "loss is inf"},
            "diverged at step 9 and ended: loss is inf",
        ),
        (
            {"event": "failed", "step": 9, "reason": "disk full"},
            "ended at step 9, whose save failed: disk full",
        ),
        ({"event": "of a later version", "step": 9}, "of a later version at step 9"),
    ],
)
def test_an_event_is_a_sentence(event, text):
    assert history.describe(event) == text


def test_a_line_is_json_of_one_line(tmp_path):
    history.add(tmp_path, "diverged", 3, reason="a\nb")
    (line,) = (tmp_path / history.FILE).read_text().splitlines()
    assert json.loads(line)["reason"] == "a\nb"
