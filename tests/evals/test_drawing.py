import numpy as np
import pytest
from matplotlib.figure import Figure

from dit_jax.evals import drawing
from dit_jax.evals.drawing import Curve


def test_names_are_moved_apart_as_little_as_possible():
    assert drawing.spread([5, 50, 30], gap=10, low=0, high=100).tolist() == [5, 50, 30]
    assert drawing.spread([20, 20], gap=10, low=0, high=100).tolist() == [15, 25]
    assert drawing.spread([40, 21, 20, 19], gap=10, low=0, high=100).tolist() == [40, 30, 20, 10]
    moved = drawing.spread(np.random.default_rng(0).uniform(0, 50, 12), gap=8, low=0, high=100)
    assert np.diff(np.sort(moved)).min() >= 8 - 1e-9


def test_names_stay_inside_of_the_axes_if_there_is_room():
    assert drawing.spread([1, 2, 3], gap=10, low=0, high=100).tolist() == [0, 10, 20]
    assert drawing.spread([99, 98], gap=10, low=0, high=100).tolist() == [100, 90]
    assert drawing.spread([5, 5], gap=10, low=0, high=4).tolist() == [0, 10]


def test_size_gives_the_colour_and_patch_the_marker():
    styles = drawing.styles_of(["S/8", "S/4", "XL/8"])
    assert styles["S/8"]["color"] == styles["S/4"]["color"] != styles["XL/8"]["color"]
    assert styles["S/8"]["marker"] == styles["XL/8"]["marker"] != styles["S/4"]["marker"]
    assert styles["S/8"]["linestyle"] != styles["S/4"]["linestyle"]


@pytest.mark.parametrize("names", [["runs/a", "runs/b"], ["S/8", "S/4"], ["adaLN", "in-context"]])
def test_other_names_have_one_colour_each(names):
    a, b = drawing.styles_of(names).values()
    assert a["color"] != b["color"] and a["marker"] != b["marker"]
    assert a["linestyle"] == b["linestyle"] == "-"


def test_ten_runs_can_be_drawn():
    assert len(drawing.styles_of([f"run{i}" for i in range(10)])) == 10


@pytest.mark.parametrize(
    "value, text",
    [
        *((0.05, "0.05"), (2, "2"), (153.6, "154"), (1000, "1,000"), (20_000, "20,000")),
        *((1e5, "$10^{5}$"), (5e9, r"$5 \cdot 10^{9}$")),
    ],
)
def test_ticks_are_plain_numbers(value, text):
    assert drawing.plain(value) == text


def draw(curves, **limits):
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.set(**limits)
    styles = drawing.styles_of([curve.name for curve in curves])
    drawing.draw(axes, curves, styles)
    return axes, styles


def test_the_names_of_curves_fit_beside_their_ends():
    curves = [Curve(f"a run {i}", [0, 10], [1, 2 + 0.001 * i], [None, None]) for i in range(5)]
    axes, styles = draw(curves)
    drawing.name_ends(axes, curves, styles)
    axes.figure.draw_without_rendering()
    boxes = [drawing.box_of(text) for text in axes.texts]
    assert [text.get_text() for text in axes.texts] == [curve.name for curve in curves]
    assert max(box.x1 for box in boxes) <= axes.bbox.x1
    centres = sorted((box.y0 + box.y1) / 2 for box in boxes)
    assert min(np.diff(centres)) >= drawing.FONT_SIZE * axes.figure.dpi / drawing.POINTS


def test_steps_have_no_tick_behind_the_last_one():
    curves = [Curve("a", [500, 2000], [2, 1], [None, None])]
    axes, _ = draw(curves)
    drawing.step_axis(axes, curves, 5)
    ticks = [text.get_text() for text in axes.get_xticklabels()]
    assert ticks[0] == "0" and ticks[-1] == "2,000"
    curves = [Curve("a", [1, 400_000], [2, 1], [None, None])]
    drawing.step_axis(axes, curves, 5)
    assert axes.get_xticklabels()[-1].get_text() == "400K"


def test_a_name_stands_beside_its_own_point():
    axes, _ = draw([Curve("a", [0, 1], [0, 1], [None, None])])
    points, names = [(0.5, 0.5), (0.52, 0.5), (0.9, 0.1)], ["left", "right", "far"]
    drawing.name_points(axes, points, names, drawing.styles_of(names))
    places = axes.transData.transform(points)
    for text, own in zip(axes.texts, places, strict=True):
        assert not drawing._is_ambiguous(drawing.box_of(text), own, places)
        assert axes.bbox.contains(*drawing.box_of(text).min)
    assert [text.get_text() for text in axes.texts] == names


def test_error_bars_need_a_deviation():
    assert drawing.errors(Curve("a", [1, 2], [1, 2], [None, None])) is None
    assert drawing.errors(Curve("a", [1, 2], [1, 2], [None, 0.5])) == [0, 0.5]
