import json
import resource

import pytest
from matplotlib import figure
from PIL import Image

from dit_jax.errors import UserError
from dit_jax.runs import record

MEANS = {"loss": 0.5, "mse": 0.4, "vb": 0.1, "grad_norm": 1.0, "data_wait": 0.1}


def make_log(path, *, start=0, peak_flops=None, measured=None):
    return record.make_log(
        path,
        start=start,
        measured=measured,
        total_steps=10,
        batch_size=32,
        flops_per_step=4e12,
        peak_flops=peak_flops,
        saved=lambda: 3,
    )


def test_a_line_of_the_record_has_metrics_and_speed(tmp_path):
    path = tmp_path / "metrics.jsonl"
    make_log(path, peak_flops=20e12)(4, MEANS, 0.5)
    (line,) = record.read(path)
    assert line == {
        "step": 4,
        **MEANS,
        "images_per_second": 64,
        "model_tflops_per_second": 8,
        "mfu": 0.4,
        "seconds_left": 3,
        "saved": 3,
    }


def test_there_is_no_mfu_if_the_peak_is_unknown(tmp_path):
    make_log(tmp_path / "m")(4, MEANS, 0.5)
    assert "mfu" not in record.read(tmp_path / "m")[0]


def test_a_resumed_run_drops_the_lines_that_it_will_repeat(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = make_log(path)
    for step in (2, 4, 6):
        log(step, MEANS, 0.5)
    with path.open("a") as file:
        file.write('{"step": 8, "lo')  # killed while writing
    log = make_log(path, start=4)
    assert [line["step"] for line in record.read(path)] == [2, 4]
    log(6, MEANS, 0.5)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [2, 4, 6]


def test_lines_that_did_not_fit_on_a_full_disk_are_written_later(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    log = make_log(path)
    log(2, MEANS, 0.5)
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 20, hard))  # a part of a line fits
    try:
        log(4, MEANS, 0.5)
        log(6, MEANS, 0.5)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before
    assert "metrics.jsonl could not be written" in caplog.text
    log(8, MEANS, 0.5)
    assert [line["step"] for line in record.read(path)] == [2, 4, 6, 8]


def test_a_new_run_starts_with_an_empty_record(tmp_path):
    path = tmp_path / "metrics.jsonl"
    make_log(path)(2, MEANS, 0.5)
    make_log(path)
    assert record.read(path) == []


@pytest.mark.parametrize("line", ["oops", "3", '{"loss": 1}', ""])
def test_a_corrupt_line_is_named(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n')
    with pytest.raises(UserError, match=f"line 2 of {path} must be a record in JSON"):
        record.read(path)


def test_the_loss_curve_merges_records_of_few_steps():
    steps = [50, 100, 126, 150, 200, 210]  # stopped after 126, saved at 210
    losses = [5.0, 4.0, 9.0, 1.0, 2.0, 7.0]
    records = [{"step": s, "mse": x} for s, x in zip(steps, losses, strict=True)]
    curve = record.curve(records, "mse")
    assert curve[0] == [50, 100, 150, 200]
    assert curve[1] == pytest.approx([5, 4, (26 * 9 + 24 * 1) / 50, 2])
    assert record.curve([{"step": 3, "mse": 2.0}], "mse") == ([3], [2.0])


def test_the_loss_curve_is_drawn(tmp_path):
    log = make_log(tmp_path / "m")
    for step in range(1, 9):
        log(step, MEANS | {"mse": 1 / step}, 0.5)
    record.plot_losses(tmp_path / "m", tmp_path / "loss.png")
    with Image.open(tmp_path / "loss.png") as image:
        assert image.width > image.height > 200
        assert image.convert("L").getextrema()[0] < 100


def test_the_loss_curve_of_one_log_shows_a_point(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, *args, **kwargs: drawn.append(self))
    make_log(tmp_path / "m")(20, MEANS, 0.5)
    record.plot_losses(tmp_path / "m", tmp_path / "loss.png")
    lines = [line for axes in drawn[0].axes for line in axes.lines]
    assert lines and all(line.get_marker() == "o" for line in lines)


def test_the_loss_curve_has_a_title_axes_that_can_be_read_and_a_smoothed_line(
    tmp_path, monkeypatch
):
    drawn = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, *args, **kwargs: drawn.append(self))
    log = make_log(tmp_path / "m")
    for step in range(10, 401, 10):
        log(step, MEANS | {"mse": 2 / step, "vb": 0.5 + 1 / step}, 0.5)
    record.plot_losses(tmp_path / "m", tmp_path / "loss.png")
    (shown,) = drawn
    assert shown.get_suptitle() == f"{tmp_path.name}: loss to step 400"
    for axes, title in zip(
        shown.axes, ("MSE of the prediction", "variational bound (bits)"), strict=True
    ):
        assert axes.get_title() == axes.get_ylabel() == title and axes.get_xlabel() == "step"
        assert [text.get_text() for text in axes.get_legend().get_texts()][1] == "smoothed"
        low, high = axes.get_ylim()
        ticks = [value for value in axes.yaxis.get_majorticklocs() if low <= value <= high]
        labels = axes.yaxis.get_major_formatter().format_ticks(ticks)
        assert len(ticks) >= 4 and all(float(text) for text in labels)  # 0.05, not 5 x 10^-2


def score(log, values):
    for step, value in values.items():
        log(step, MEANS | {"frechet_distance": value, "kid": value - 3}, 0.5)


def test_scores_are_plotted_with_labelled_axes(tmp_path, monkeypatch):
    """Over all records with scores, on a logarithmic axis where all values are above 0."""
    drawn = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, *args, **kwargs: drawn.append(self))
    log = make_log(tmp_path / "m")
    record.plot_scores(tmp_path / "m", tmp_path / "scores.png")
    log(1, MEANS, 0.5)  # without a score, as older records
    record.plot_scores(tmp_path / "m", tmp_path / "scores.png")
    assert not drawn
    score(log, {2: 20.0, 4: 9.0, 8: 2.5})
    record.plot_losses(tmp_path / "m", tmp_path / "loss.png")
    record.plot_scores(tmp_path / "m", tmp_path / "scores.png")
    shown = drawn[-1]
    assert shown.get_suptitle() == f"{tmp_path.name}: scores of the EMA to step 8"
    first, second = shown.axes
    for axes, title in zip(shown.axes, record.SCORES.values(), strict=True):
        assert axes.get_title() == axes.get_ylabel() == title and axes.get_xlabel() == "step"
        assert list(axes.lines[0].get_xdata()) == [2, 4, 8]
    assert list(first.lines[0].get_ydata()) == [20, 9, 2.5] and first.get_yscale() == "log"
    assert list(second.lines[0].get_ydata()) == [17, 6, -0.5] and second.get_yscale() == "linear"


def test_a_score_of_the_resumed_step_is_added_to_its_line(tmp_path):
    log = make_log(tmp_path / "m")
    for step in (2, 4, 6):
        log(step, MEANS, 0.5)
    make_log(tmp_path / "m", start=4, measured={"kid": 0.5})
    assert [line.get("kid") for line in record.read(tmp_path / "m")] == [None, 0.5]


def test_smoothing_removes_a_spike_and_keeps_a_slope():
    slope = [float(i) for i in range(100)]
    spiked = [*slope[:50], 1000.0, *slope[51:]]
    assert record.smooth(slope)[10:90] == pytest.approx(slope[10:90])
    assert record.smooth(spiked) == pytest.approx(slope, abs=5)
    assert record.smooth([3.0, 1.0]) == [3.0, 1.0]  # too few to smooth
