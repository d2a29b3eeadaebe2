"""The report as a file: what is in it, that it requests nothing, and its size."""

import base64
import gzip
import json
import time
from html.parser import HTMLParser

import pytest
import receipts
import written_run
from plotly import offline

from dit_jax.errors import UserError
from dit_jax.machine import disk
from dit_jax.runs import page, report

MB = 1_000_000


class Page(HTMLParser):
    """The elements, the text that is seen, and the scripts by their id."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.texts, self.scripts, self._inside = [], [], {}, None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self._inside = dict(attrs).get("id", tag)

    def handle_endtag(self, tag):
        if tag in ("script", "style"):
            self._inside = None

    def handle_data(self, data):
        if self._inside:
            self.scripts[self._inside] = self.scripts.get(self._inside, "") + data
        else:
            self.texts.append(data.strip())

    def find(self, tag):
        return [attrs for each, attrs in self.elements if each == tag]

    @property
    def text(self):
        return " ".join(filter(None, self.texts))


def write(*paths):
    out = paths[0].parent / "report.html"
    report.write(paths, out)
    return Page(out.read_text())


@pytest.fixture
def run(tmp_path):
    """A run with everything that a report shows."""
    events = [
        written_run.STARTED,
        {"event": "resumed", "step": 40, "devices": "2 x cpu", "num_devices": 2, "lost": 3},
        {"event": "rolled back", "step": 70, "to": 60, "reason": "loss is <nan>"},
        {"event": "finished", "step": 100},
    ]
    path = written_run.write(tmp_path / "run", events=events, frechet_distance=2.5, kid=0.1)
    written_run.saved(path, 100, class_names=["zero", *"123456789"])
    written_run.samples(path, 50, 100)
    (path / "damaged" / "80").mkdir(parents=True)
    receipt = receipts.receipt(value=7.25, deviation=0.5, step=100)
    receipt["held_out"] = {receipts.FID: 1.5}
    receipts.write(path / "evaluation" / "receipt.json", receipt)
    return path


def test_the_page_has_every_part_of_a_run(run):
    text = write(run).text
    for part in (
        *("DiT-Ti/4", "finished", "100 of 100", "Always the same noise", "zero, 1, 2, 3"),
        *("MSE of the prediction", "gradient norm", "images/s", "time spent waiting for data (%)"),
        *(
            "Frechet distance (classifier features)",
            "7.25\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}0.5",
            "evaluation/ receipt.json",
        ),
        *("ddim ddim25 guidance 1", "held-out images", "1.5"),
        *("resumed from step 40 on 2 x cpu; 3 steps after it had been lost", "Saved steps: 100."),
        "diverged at step 70 and went back to step 60, skipping 10 batches: loss is <nan>",
        "step 80 was corrupt and was set aside in damaged/80",
        *("13 steps were lost or skipped", "4.52 · 10 14", "model FLOPs", "3.7 min device time"),
    ):
        assert part in text, part
    assert "train.batch_size 32 256" in text  # as here, as in configs/base.py


def test_the_page_requests_nothing(run):
    found = write(run)
    for _, attrs in found.elements:
        for name in ("src", "href", "action", "data", "poster", "srcset"):
            assert attrs.get(name, "data:").startswith("data:image/") or name not in attrs
    policies = [each["content"] for each in found.find("meta") if "http-equiv" in each]
    (policy,) = policies
    assert policy.startswith("default-src 'none';") and "http" not in policy
    assert not found.find("link") and "@import" not in found.scripts["style"]


def test_the_curves_and_the_library_are_inside(run):
    found = write(run)
    figures = json.loads(found.scripts["charts"])
    plots = [each["id"] for each in found.find("div") if each.get("class") == "plot"]
    assert plots == [f"chart{i}" for i in range(len(figures))] and len(plots) == 7
    assert figures[0]["data"][0]["x"] == [*range(10, 101, 10)]
    library = gzip.decompress(base64.b64decode(found.scripts["plotly"]))
    assert library.decode() == offline.get_plotlyjs()


def test_the_slider_has_the_steps_of_the_samples_and_shows_the_last(run):
    found = write(run)
    (slider,) = found.find("input")
    assert json.loads(slider["data-steps"]) == [50, 100]
    assert (slider["type"], slider["min"], slider["max"], slider["value"]) == (
        *("range", "0", "1", "1"),
    )
    assert [(each["data-step"], "hidden" in each) for each in found.find("img")] == [
        ("50", True),
        ("100", False),
    ]


def test_runs_are_compared_by_the_fields_in_which_they_differ(run, tmp_path):
    config = written_run.CONFIG | {"train": {"batch_size": 64}, "seed": 7}
    other = written_run.write(tmp_path / "other", [10, 20], config=config)
    found = write(run, other)
    text = found.text.partition("How the runs differ")[2].partition("Samples")[0]
    assert text.split() == [
        "field",
        "run",
        "other",
        "seed",
        "0",
        "7",
        "train.batch_size",
        "32",
        "64",
    ]
    figures = json.loads(found.scripts["charts"])
    names = [each["name"] for each in figures[0]["data"] if each.get("showlegend", True)]
    assert names == ["run", "other"]
    assert "stopped at step 20" in found.text


def test_judgments_of_digits_are_beside_those_of_real_digits(tmp_path):
    run = written_run.write(tmp_path / "run")
    judgments = {"agreement": 0.987, "agreement_by_label": [0.9, 1.0], "classifier_accuracy": 0.99}
    (run / "judgments.json").write_text(json.dumps({"step": 100, "judgments": judgments}))
    text = write(run).text
    assert "step 100, by judgments.json score samples real digits" in text
    assert "agreement with the label 0.987 0.99" in text and "must have" not in text
    assert "0.987 agreement with the label at step 100" in text  # the best score


def test_a_run_that_is_being_written_is_reported_as_it_is(run):
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 110, "loss": 0.')
    with (run / "history.jsonl").open("a") as file:
        resumed = {"time": "2026-11-28T09:00:00+00:00", "event": "resumed", "step": 100}
        file.write(json.dumps(resumed) + '\n{"time": "2026')
    (run / "checkpoints" / "110.orbax-checkpoint-tmp").mkdir()
    with disk.locked(run, "workdir"):
        found = write(run)
    assert "running state 100 of 100 step" in found.text and "Saved steps: 100." in found.text
    assert not [attrs for _, attrs in found.elements if attrs.get("class") == "problem"]


def test_runs_of_the_same_name_are_told_apart(tmp_path):
    paths = [written_run.write(tmp_path / each / "run") for each in "ab"]
    runs = report.write([*paths, paths[0]], tmp_path / "report.html")
    assert [run.name for run in runs] == ["a/run", "b/run"]
    assert "The runs have the same configuration." in write(*paths).text


def test_a_run_without_a_step_is_one_line(tmp_path):
    found = write(written_run.write(tmp_path / "run", []))
    assert "no step was logged yet, so there are no curves yet" in found.text
    assert "charts" not in found.scripts and not found.find("img")
    assert "train.batch_size" in found.text


def test_a_damaged_run_has_a_line_and_its_other_parts(run):
    (run / "metrics.jsonl").write_text("oops\n")
    (run / "samples" / "0000050.png").write_bytes(b"")
    found = write(run)
    problems = [attrs for tag, attrs in found.elements if attrs.get("class") == "problem"]
    assert len(problems) == 2
    assert "line 1 of " in found.text and "0000050.png cannot be shown" in found.text
    assert "charts" not in found.scripts and len(found.find("img")) == 1


def test_a_run_without_its_config_has_its_curves(run):
    (run / "config.json").write_text("{")
    found = write(run)
    assert "config.json must be the config of a run, but it is damaged" in found.text
    assert len(json.loads(found.scripts["charts"])) == 7


def test_a_damaged_meta_is_a_line(run):
    (run / "checkpoints" / "100" / "meta" / "metadata").write_text("{")
    assert f"{run}/checkpoints/100/meta/metadata must be JSON, but it is damaged" in write(run).text


def test_rollbacks_of_a_run_without_history_come_from_its_checkpoint(tmp_path):
    path = written_run.write(tmp_path / "run")
    written_run.saved(path, 100, rollbacks=[[70, 60]])
    text = write(path).text
    assert "diverged at step 70 and went back to step 60, skipping 10 batches" in text
    assert "Starts and resumes were not recorded by the version that trained it." in text
    assert "50 s time of the steps" in text


def test_text_of_a_run_is_escaped(tmp_path):
    config = written_run.CONFIG | {"data": {"source": "images", "path": "</script><b>x"}}
    name = "<img src=http:x>"
    found = write(written_run.write(tmp_path / name, config=config))
    assert not found.find("img") and "</script><b>x" in found.text and name in found.text
    assert "<" not in found.scripts["charts"]


def test_a_run_of_2000_logged_steps_with_large_samples_is_below_3_mb_and_fast(tmp_path):
    path = written_run.write(tmp_path / "run", range(1, 2001), mfu=0.4, frechet_distance=2.5, kid=1)
    written_run.samples(path, *range(100, 2001, 100), size=(400, 400))
    assert len(page._plotly()) < 2.1 * MB
    report.refresh(path)
    assert 2 * MB < (path / "report.html").stat().st_size < 3 * MB
    started = time.process_time()
    report.refresh(path)  # the pictures are known now, as in a run that trains
    assert time.process_time() - started < 1


def test_a_refresh_that_fails_is_only_warned_of(tmp_path, caplog):
    report.refresh(tmp_path / "none")
    assert f"{tmp_path}/none/report.html could not be written: WORKDIR must be a" in caplog.text


def test_a_folder_that_is_no_run_writes_nothing(tmp_path):
    run = written_run.write(tmp_path / "run")
    with pytest.raises(UserError, match="WORKDIR must be a run of dit-train, got "):
        report.write([run, tmp_path], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()
