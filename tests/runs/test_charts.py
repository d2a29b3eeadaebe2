import json

import plotly.graph_objects
import pytest
import receipts
import written_run

from dit_jax.runs import charts, summary

STARTED = written_run.STARTED


def read(path, name=None, **fields):
    return summary.read(written_run.write(path, **fields), name)


def test_each_metric_and_score_of_the_record_is_a_figure(tmp_path):
    titles = [title for title, _ in charts.make([read(tmp_path / "run")])]
    expected = ["MSE of the prediction", "variational bound (bits)", "gradient norm", "images/s"]
    assert titles == [*expected, "time spent waiting for data (%)"]
    scored = charts.make([read(tmp_path / "run", mfu=0.4, frechet_distance=2.0, kid=0.1)])
    figures = dict(scored)
    assert figures.keys() - {*titles} == {
        *("MFU (%)", "Frechet distance (classifier features)", "KID (classifier features)")
    }
    assert set(figures["MFU (%)"]["data"][0]["y"]) == {40.0}


def test_plotly_accepts_every_figure(tmp_path):
    runs = [read(tmp_path / "a", frechet_distance=2.0, kid=0.1), read(tmp_path / "b", mfu=0.4)]
    for runs_shown in (runs, runs[:1]):
        for _, figure in charts.make(runs_shown):
            # ValueError for a name that it does not know
            assert len(plotly.graph_objects.Figure(figure).data) == len(figure["data"])
            json.dumps(figure, allow_nan=False)


def test_one_run_has_its_means_and_the_smoothed_ones_on_a_logarithmic_axis(tmp_path):
    figure = dict(charts.make([read(tmp_path / "run")]))["MSE of the prediction"]
    raw, smoothed = figure["data"]
    assert raw["x"] == smoothed["x"] == [*range(10, 101, 10)]
    assert raw["y"] == [float(f"{0.9 / step:.4g}") for step in raw["x"]]
    assert (raw["name"], smoothed["name"]) == ("mean since the last log", "smoothed")
    assert figure["layout"]["yaxis"]["type"] == "log" and figure["layout"]["showlegend"]


def test_a_curve_with_values_below_zero_has_a_linear_axis(tmp_path):
    figure = dict(charts.make([read(tmp_path / "run", vb=-0.1)]))["variational bound (bits)"]
    assert "type" not in figure["layout"]["yaxis"]


def test_runs_are_overlaid_and_one_click_hides_both_curves_of_a_run(tmp_path):
    runs = [read(tmp_path / name, name) for name in ("a", "b", "c")]
    traces = dict(charts.make(runs))["MSE of the prediction"]["data"]
    assert [each.get("legendgroup") for each in traces] == ["a", "a", "b", "b", "c", "c"]
    assert [each["name"] for each in traces if each.get("showlegend", True)] == ["a", "b", "c"]
    assert len({each["line"]["color"] for each in traces}) == 3


def test_resumes_and_rollbacks_are_lines_of_a_single_run(tmp_path):
    events = [
        STARTED,
        {"event": "resumed", "step": 40, "num_devices": 8},
        {"event": "rolled back", "step": 70, "to": 60},
        {"event": "finished", "step": 100},
    ]
    run = read(tmp_path / "run", events=events)
    assert [line["x0"] for line in charts.make([run])[0][1]["layout"]["shapes"]] == [40, 70]
    assert charts.make([run, run])[0][1]["layout"]["shapes"] == []


def test_a_value_that_is_not_finite_is_a_gap(tmp_path):
    figure = dict(charts.make([read(tmp_path / "run", grad_norm=float("nan"))]))["gradient norm"]
    assert set(figure["data"][0]["y"]) == {None}


def test_scores_of_receipts_are_a_curve_if_there_are_two_steps(tmp_path):
    path = written_run.write(tmp_path / "run")
    for count, step in enumerate((400, 800), 1):
        receipt = receipts.receipt(value=10.0 / count, step=step)
        receipts.write(path / "scores" / str(step) / "receipt.json", receipt)
        titles = dict(charts.make([summary.read(path)]))
        assert (f"{receipts.FID}, of receipts" in titles) == (count == 2)
    (trace,) = titles[f"{receipts.FID}, of receipts"]["data"]
    assert (trace["x"], trace["y"]) == ([400, 800], [10.0, 5.0])


@pytest.mark.parametrize("count", [1, 99, 100, 101, 2000])
def test_a_thinned_curve_has_the_mean_and_the_last_step(count):
    steps, values = list(range(1, count + 1)), [float(i % 7) for i in range(count)]
    thin_steps, means = charts.thin(steps, values, 100)
    assert len(thin_steps) == len(means) <= 100 and thin_steps[-1] == count
    sizes = [b - a for a, b in zip([0, *thin_steps], thin_steps, strict=False)]
    total = sum(size * mean for size, mean in zip(sizes, means, strict=True))
    assert total == pytest.approx(sum(values))
