"""dit-report and dit-runs. test_train.py has the report of a resumed run."""

import json
from types import SimpleNamespace

import pytest
import written_run

from dit_jax.cli import report, runs


@pytest.mark.slow
def test_a_run_has_a_report_with_its_samples_and_a_row(call, reference):
    text = (reference / "report.html").read_text()
    assert "60 of 60" in text and "<b>finished</b>" in text and 'data-steps="[30, 60]"' in text
    _, out, _ = call(runs, reference.parent)
    assert out.splitlines()[1].split()[:4] == ["reference", "Pi/4", "digits", "60/60"]
    assert "finished" in out


def test_a_report_of_one_run_is_in_it_and_of_several_here(call, tmp_path, caplog):
    caplog.set_level("INFO")
    paths = [written_run.write(tmp_path / name) for name in ("a", "b")]
    assert call(report, paths[0])[0] == 0
    assert "<title>a</title>" in (paths[0] / "report.html").read_text()
    assert call(report, *paths, f"--out={tmp_path}/both.html")[0] == 0
    assert f"2 runs: {tmp_path}/both.html" in caplog.text
    assert "<title>a, b</title>" in (tmp_path / "both.html").read_text()
    assert str(report.choose(SimpleNamespace(out=None), ["a", "b"])) == "report.html"


def test_a_damaged_run_is_reported_with_a_warning(call, tmp_path, caplog):
    path = written_run.write(tmp_path / "run")
    (path / "metrics.jsonl").write_text("oops\n")
    assert call(report, path)[0] == 0
    assert f"run: line 1 of {path}/metrics.jsonl must be a record" in caplog.text
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
