"""dit-report and dit-runs, and the report that dit-train writes."""

import json
from types import SimpleNamespace

import pytest
import small_run
import written_run

from dit_jax.cli import report, runs, train
from dit_jax.runs import history

TRAIN = (
    *(option for option in small_run.SHORT if "run." not in option),
    *("--config.run.log_every=1", "--config.run.checkpoint_every=4"),
    *("--config.run.sample_every=4", "--config.run.num_samples=10"),
)


def test_training_writes_a_report_at_every_save_and_a_history(call, tmp_path, monkeypatch):
    run, states = tmp_path / "run", []
    replace = report_lib_refresh(monkeypatch, states)
    code, _, errors = call(train, *TRAIN, f"--workdir={run}", "--config.run.total_steps=6")
    assert code == 0, errors
    assert states == ["running", "running", "finished"]  # at steps 4 and 6, and at the end
    text = (run / "report.html").read_text()
    assert "6 of 6" in text and 'data-steps="[4, 6]"' in text
    replace()
    assert call(train, *TRAIN, f"--workdir={run}", "--config.run.total_steps=9")[0] == 0
    events = [(each["event"], each["step"]) for each in history.read(run)]
    assert events == [("started", 0), ("finished", 6), ("resumed", 6), ("finished", 9)]
    text = (run / "report.html").read_text()
    assert "resumed from step 6 on 8 x cpu" in text and 'data-steps="[4, 6, 8, 9]"' in text
    _, out, _ = call(runs, tmp_path)
    assert out.splitlines()[1].split()[:4] == ["run", "Ti/4", "digits", "9/9"]


def report_lib_refresh(monkeypatch, states):
    """Notes the state of a run at each refresh, until the returned function is called."""
    from dit_jax.runs import report as report_lib
    from dit_jax.runs import summary

    refresh = report_lib.refresh

    def noted(workdir):
        refresh(workdir)
        states.append(summary.read(workdir).state)

    monkeypatch.setattr(report_lib, "refresh", noted)
    return lambda: monkeypatch.setattr(report_lib, "refresh", refresh)


def test_a_rollback_and_the_end_of_a_diverged_run_are_in_its_history(tmp_path):
    options = ("--config.train.learning_rate=1e30", "--config.train.warmup_steps=0")
    more = ("--config.run.checkpoint_every=1", "--config.run.max_rollbacks=1")
    small_run.finish(small_run.start(tmp_path / "run", *options, *more), code=3)
    started, rolled, ended = history.read(tmp_path / "run")
    assert started["event"] == "started" and ended["event"] == "diverged"
    assert rolled["event"] == "rolled back" and rolled["to"] == rolled["step"] - 1
    assert f" at step {rolled['step']}" in rolled["reason"]
    text = (tmp_path / "run" / "report.html").read_text()
    assert f"diverged at step {ended['step']}" in text


def test_a_report_of_one_run_is_in_it_and_of_several_here(call, tmp_path):
    paths = [written_run.write(tmp_path / name) for name in ("a", "b")]
    assert call(report, paths[0])[0] == 0
    assert "<title>a</title>" in (paths[0] / "report.html").read_text()
    code, _, errors = call(report, *paths, f"--out={tmp_path}/both.html")
    assert code == 0 and f"2 runs: {tmp_path}/both.html" in errors
    assert "<title>a, b</title>" in (tmp_path / "both.html").read_text()
    assert str(report.choose(SimpleNamespace(out=None), ["a", "b"])) == "report.html"


def test_a_damaged_run_is_reported_with_a_warning(call, tmp_path):
    path = written_run.write(tmp_path / "run")
    (path / "metrics.jsonl").write_text("oops\n")
    code, _, errors = call(report, path)
    assert code == 0 and f"run: line 1 of {path}/metrics.jsonl must be a record" in errors
    assert "line 1 of" in (path / "report.html").read_text()


@pytest.mark.parametrize(
    "module, words, message",
    [
        (report, [], "takes WORKDIR [WORKDIR ...], got none"),
        (report, ["/nowhere"], "WORKDIR must exist, got /nowhere"),
        (report, ["{run}", "{tmp}"], "WORKDIR must be a run of dit-train, got {tmp}"),
        (report, ["{run}", "--out={tmp}/x.pdf"], "out must end with .html, got {tmp}/x.pdf"),
        (report, ["{run}", "--out={tmp}/no/x.html"], "out must be in a directory that exists, "),
        (runs, ["a", "b"], "takes [DIR], got 'a b'"),
        (runs, ["/nowhere"], "DIR must exist, got /nowhere"),
        (runs, ["{tmp}/empty"], "DIR must have runs of dit-train in or below it, got {tmp}/em"),
    ],
)
def test_wrong_use_is_one_line_and_writes_nothing(refuse, tmp_path, module, words, message):
    run = written_run.write(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    before = sorted(tmp_path.rglob("*"))
    words = [word.format(run=run, tmp=tmp_path) for word in words]
    assert message.format(tmp=tmp_path) in refuse(module, *words)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_report_of_a_run_in_a_bucket(call, bucket_path, tmp_path):
    run = written_run.write(tmp_path / "run", events=[written_run.STARTED])
    written_run.samples(run, 50)
    for file in run.rglob("*"):
        if file.is_file():
            (bucket_path / file.relative_to(run)).write_bytes(file.read_bytes())
    assert call(report, bucket_path, f"--out={tmp_path}/report.html")[0] == 0
    text = (tmp_path / "report.html").read_text()
    assert "running, or killed after step 100" in text and 'data-steps="[50]"' in text
    code, out, _ = call(runs, bucket_path)
    assert code == 0 and "100/100" in out and "0 B" not in out
    assert json.loads((bucket_path / "config.json").read_text()) == written_run.CONFIG
