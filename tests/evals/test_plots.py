"""The pictures: files of the right size, and what is drawn in them."""

import numpy as np
import pytest
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from PIL import Image
from receipts import FID, PAPER, receipt, run, runs_of_paper

from dit_jax.evals import drawing, plots

DESIGNS = {"in_context": 35.2, "cross_attention": 26.1, "adaln": 25.2, "adaln_zero": 19.5}


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were written, as a list."""
    figures, write = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: (figures.append(self), write(self, *a, **k))
    )
    return figures


def check_file(path):
    """A picture 6 inches wide, with colours."""
    with Image.open(path) as image:
        assert image.width == drawing.WIDTH * drawing.DPI and image.height > 400
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    assert (pixels != pixels[:, :1]).any() and pixels.max() == 255


def texts(axes):
    return [text.get_text() for text in axes.texts]


def entries(field, values, runs=("runs/a", "runs/b")):
    return [
        {
            "run": each,
            "value": value,
            "receipt": receipt(value=2 + i + (j - 1) ** 2, deviation=0.1 * i),
        }
        for i, each in enumerate(runs)
        for j, value in enumerate(values)
    ]


def test_a_sweep_has_a_curve_for_each_run_and_marks_the_best(tmp_path, drawn):
    given = entries("cfg_scale", [1.0, 1.5, 2.0, 4.0])
    plots.sweep(tmp_path / "a.png", given[::-1], field="cfg_scale", score=FID)
    check_file(tmp_path / "a.png")
    (axes,) = drawn[0].axes
    assert axes.get_xlabel() == "guidance scale" and axes.get_ylabel() == f"{FID} ↓"
    assert texts(axes) == ["3.00", "2.00", "b", "a"] or texts(axes) == ["2.00", "3.00", "a", "b"]
    assert len(axes.containers) == 2
    rings = [line for line in axes.lines if line.get_markersize() == 10]
    assert {tuple(ring.get_xdata()) for ring in rings} == {(1.5,)}


def test_a_score_that_is_good_if_high_has_its_best_at_the_top(tmp_path, drawn):
    given = entries("cfg_scale", [1.0, 1.5, 2.0, 4.0], runs=("a",))
    for entry in given:
        entry["receipt"]["scores"] = {"recall": entry["receipt"]["scores"][FID]}
    plots.sweep(tmp_path / "a.png", given, field="cfg_scale", score="recall")
    assert drawn[0].axes[0].get_ylabel() == "recall ↑"
    assert texts(drawn[0].axes[0])[0] == "6.00"


def test_the_best_score_at_the_first_value_is_written_beside_the_axis(tmp_path, drawn):
    given = entries("cfg_scale", [1.0, 2.0, 3.0], runs=("a",))
    for value, entry in zip((0.196, 0.95, 2.12), given, strict=True):
        entry["receipt"]["scores"][FID]["value"] = value
    plots.sweep(tmp_path / "a.png", given, field="cfg_scale", score=FID)
    axes = drawn[0].axes[0]
    assert texts(axes) == ["0.196", "a"]
    assert drawing.box_of(axes.texts[0]).x0 > axes.bbox.x0


def test_a_sweep_of_steps_is_logarithmic_and_one_of_words_has_no_lines(tmp_path, drawn):
    values = ["ddim16", "ddim64", "ddim256"]
    plots.sweep(tmp_path / "a.png", entries("num_steps", values), field="num_steps", score=FID)
    axes = drawn[0].axes[0]
    assert axes.get_xscale() == "log" and list(axes.get_xticks()) == [16, 64, 256]
    plots.sweep(tmp_path / "b.png", entries("x", ["ddpm", "ddim"]), field="sampler", score=FID)
    axes = drawn[1].axes[0]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["ddpm", "ddim"]
    assert all(line.get_linestyle() == "None" or len(line.get_xdata()) == 1 for line in axes.lines)


def test_runs_with_the_same_last_name_are_named_in_full(tmp_path, drawn):
    given = entries("cfg_scale", [1.0, 2.0], runs=("one/x", "two/x"))
    plots.sweep(tmp_path / "a.png", given, field="cfg_scale", score=FID)
    assert texts(drawn[0].axes[0])[-2:] == ["one/x", "two/x"]


def test_scores_against_the_compute_of_sampling(tmp_path, drawn):
    given = []
    for model, (gflops, fid) in PAPER.items():
        for passes in (64, 16, 256):
            each = receipt(model, gflops=gflops, value=fid * (1 + 5 / passes))
            each["model"]["passes"] = passes
            given.append(each)
    plots.sampling_compute(tmp_path / "a.png", given, score=FID)
    check_file(tmp_path / "a.png")
    axes = drawn[0].axes[0]
    assert axes.get_xscale() == "log" and axes.get_xlabel().endswith("(Gflops per image)")
    assert sorted(texts(axes)) == sorted(PAPER)
    curves = [np.asarray(each[0].get_xdata(), float) for each in axes.containers]
    np.testing.assert_allclose(curves[0], [0.36 * 16, 0.36 * 64, 0.36 * 256])


def test_two_checkpoints_of_one_model_are_named_by_their_paths(tmp_path, drawn):
    given = [receipt("S/4", path=f"runs/{name}") for name in ("first", "second")]
    plots.sampling_compute(tmp_path / "a.png", given, score=FID)
    assert sorted(texts(drawn[0].axes[0])) == ["first", "second"]


def test_scores_against_the_compute_of_models(tmp_path, drawn):
    plots.model_compute(tmp_path / "a.png", runs_of_paper(), step=400_000, score=FID)
    check_file(tmp_path / "a.png")
    axes = drawn[0].axes[0]
    summary, *names = texts(axes)
    assert "correlation \N{MINUS SIGN}0.93" in summary and "Gflops$^{-0.36}$" in summary
    assert names == [each.model for each in runs_of_paper()]
    assert axes.get_xscale() == axes.get_yscale() == "log"


def test_two_models_have_no_line(tmp_path, drawn):
    plots.model_compute(tmp_path / "a.png", runs_of_paper()[:2], step=400_000, score=FID)
    assert texts(drawn[0].axes[0]) == ["S/8", "S/4"]


def test_scores_against_the_compute_of_training(tmp_path, drawn):
    plots.training_compute(tmp_path / "a.png", runs_of_paper(), score=FID)
    check_file(tmp_path / "a.png")
    axes = drawn[0].axes[0]
    assert texts(axes) == [each.model for each in runs_of_paper()]
    last = axes.containers[-1][0].get_xdata()[-1]
    assert last == pytest.approx(118.64 * 256 * 400_000 * 3)


def test_scores_over_the_steps_have_panels_by_patch_and_by_size(tmp_path, drawn):
    plots.training(tmp_path / "a.png", runs_of_paper(), score=FID)
    check_file(tmp_path / "a.png")
    panels = {axes.get_title(): texts(axes) for axes in drawn[0].axes if axes.axison}
    sizes, patches = ["S", "B", "L", "XL"], ["8", "4", "2"]
    by_patch = {f"patch {patch}": sizes for patch in patches}
    assert panels == by_patch | {f"size {size}": [f"/{p}" for p in patches] for size in sizes}
    limits = {axes.get_ylim() for axes in drawn[0].axes}
    assert len(limits) == 1  # panels can be compared


@pytest.mark.parametrize(
    "models, titles",
    [
        (["S/8", "B/8"], ["patch 8"]),
        (["S/8", "S/4"], ["size S"]),
        (["S/8", "B/4"], [""]),
        (["S/8", "S/4", "B/4"], ["patch 4", "size S"]),
    ],
)
def test_panels_of_one_model_are_left_out(tmp_path, drawn, models, titles):
    runs = [each for each in runs_of_paper() if each.model in models]
    plots.training(tmp_path / "a.png", runs, score=FID)
    assert [axes.get_title() for axes in drawn[0].axes if axes.axison] == titles


def test_the_designs_are_named_as_in_the_paper(tmp_path, drawn):
    runs = [run("XL/2", each, gflops=118, value=fid) for each, fid in DESIGNS.items()]
    plots.designs(tmp_path / "a.png", runs, score=FID)
    check_file(tmp_path / "a.png")
    names = ["in-context", "cross-attention", "adaLN", "adaLN-Zero"]
    assert texts(drawn[0].axes[0]) == names and drawn[0].axes[0].get_title() == "XL/2"


def test_designs_of_several_seeds_have_bands_over_steps_and_time(tmp_path, drawn):
    runs = [run("Ti/2", name, gflops=1, value=y) for name, y in (("noise", 9.0), ("v", 8.0))]
    runs = [each._replace(times=([0, 400_000], [0, 7200])) for each in runs]
    runs[1] = runs[1]._replace(seeds=3)
    plots.designs(tmp_path / "a.png", runs, score=FID)
    plots.designs(tmp_path / "b.png", runs, score=FID, over_time=True)
    check_file(tmp_path / "b.png")
    by_steps, by_time = (figure.axes[0] for figure in drawn)
    assert (by_steps.get_xlabel(), by_time.get_xlabel()) == (
        "training steps",
        "minutes of training",
    )
    assert list(by_time.containers[0][0].get_xdata()) == pytest.approx([30, 60, 120])
    for axes in (by_steps, by_time):
        assert texts(axes) == ["noise", "v"]
        (band,) = (each for each in axes.collections if isinstance(each, PolyCollection))
        top = band.get_paths()[0].vertices[:, 1].max()
        first = runs[1].receipts[0]["scores"][FID]
        assert top == pytest.approx(first["value"] + first["deviation"])
        assert [each.has_yerr for each in axes.containers] == [True, False]


def test_scores_against_network_calls_have_a_curve_for_each_sampler(tmp_path, drawn):
    given = entries("num_steps", ["50", "10", "20"], runs=("digits/heun", "digits/ddim"))
    for entry in given:
        steps = int(entry["value"])
        entry["receipt"]["model"]["calls"] = 2 * steps - 1 if "heun" in entry["run"] else steps
    plots.sampling_calls(tmp_path / "a.png", given, score=FID)
    check_file(tmp_path / "a.png")
    axes = drawn[0].axes[0]
    assert axes.get_xlabel() == "network calls for a sample" and axes.get_xscale() == "log"
    curves = [list(each[0].get_xdata()) for each in axes.containers]
    assert sorted(curves) == [[10, 20, 50], [19, 39, 99]]
    assert sorted(texts(axes)) == ["ddim", "heun"]


def test_scores_against_seconds_have_a_curve_for_each_run(tmp_path, drawn):
    given = entries("cache", ["none", "every:2"], runs=("digits/50", "digits/25"))
    for i, entry in enumerate(given):
        entry["seconds"] = 1 / (i + 1)
    plots.sampling_seconds(tmp_path / "a.png", given, score=FID)
    check_file(tmp_path / "a.png")
    axes = drawn[0].axes[0]
    assert axes.get_xlabel() == "seconds for a sample" and axes.get_xscale() == "log"
    curves = [sorted(each[0].get_xdata()) for each in axes.containers]
    assert sorted(curves, key=sum) == [[1 / 4, 1 / 3], [1 / 2, 1]]


def test_the_losses_of_runs_without_their_first_fall(tmp_path, drawn):
    losses = {each.model: each.losses for each in runs_of_paper()}
    losses["S/8"][1][0] = 50.0
    plots.losses(tmp_path / "a.png", losses)
    check_file(tmp_path / "a.png")
    axes = drawn[0].axes[0]
    assert sorted(texts(axes)) == sorted(PAPER) and axes.get_ylim()[1] < 1


def test_names_of_runs_with_few_late_scores_stay_in_their_panel(tmp_path, drawn):
    models = zip(("S/8", "S/4", "B/8", "B/4"), (40, 30, 20, 10), strict=True)
    runs = [run(name, gflops=1, value=value, steps=(500, 1000)) for name, value in models]
    plots.training(tmp_path / "a.png", runs, score=FID)
    for axes in drawn[0].axes:
        assert axes.get_xlim()[0] == 0
        assert all(drawing.box_of(text).x1 <= axes.bbox.x1 for text in axes.texts)
