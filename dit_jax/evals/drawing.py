"""How pictures of scores look: PNG files, 6 inches wide, with names beside the curves.

The colours are told apart by the colour-blind, and in grey by their markers. matplotlib
and scipy.optimize are imported inside, since that takes half a second.
"""

import contextlib
import re
from typing import NamedTuple

import numpy as np

from dit_jax.machine import disk

WIDTH = 6.0  # inches: the text of a page
DPI = 200
POINTS = 72  # an inch
COLORS = (  # Okabe & Ito 2008, without yellow
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9"),
)
MARKERS = "osDv^PX"
LINES = ("-", (0, (4, 1.5)), (0, (1, 1)), (0, (4, 1, 1, 1)))
SIDES = (  # where the name of a point may be: offset in points, alignment
    *((9, 0, "left"), (-9, 0, "right"), (0, 11, "center"), (0, -11, "center")),
    *((8, 8, "left"), (8, -8, "left"), (-8, 8, "right"), (-8, -8, "right")),
    *((20, 14, "left"), (20, -14, "left"), (-20, 14, "right"), (-20, -14, "right")),
    *((28, 24, "left"), (28, -24, "left"), (-28, 24, "right"), (-28, -24, "right")),
)
FONT_SIZE = 9  # points
GREY = "#666666"
LOOK = {
    **{"font.size": FONT_SIZE, "axes.titlesize": FONT_SIZE, "axes.labelsize": FONT_SIZE},
    **{"xtick.labelsize": FONT_SIZE - 1, "ytick.labelsize": FONT_SIZE - 1},
    **{"axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True},
    **{"axes.grid": True, "grid.alpha": 0.3, "grid.linewidth": 0.6},
    **{"lines.linewidth": 1.4, "lines.markersize": 4.5, "errorbar.capsize": 2},
}


class Curve(NamedTuple):
    """A named line through points. deviations: of y, None where unknown."""

    name: str
    x: list
    y: list
    deviations: list


@contextlib.contextmanager
def picture(path, *, height):
    """A context with a Figure of that height in inches, which is written at its end."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(LOOK):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        yield figure
        with disk.path(path).open("wb") as file:
            figure.savefig(file, dpi=DPI, format="png")


def styles_of(names):
    """{name: style of matplotlib}: colour by size and marker by patch for names such as S/4."""
    families = [re.fullmatch(r"(.+)/(\d+)", name) for name in names]
    if all(families) and len({family[1] for family in families}) > 1:
        keys = [(family[1], family[2]) for family in families]
    else:
        keys = [(name, name) for name in names]
    firsts, seconds = (list(dict.fromkeys(column)) for column in zip(*keys, strict=True))
    is_family = len(seconds) < len(names)
    styles = {}
    for name, (first, second) in zip(names, keys, strict=True):
        i, j = firsts.index(first), seconds.index(second)
        styles[name] = {
            "color": COLORS[i % len(COLORS)],
            "marker": MARKERS[j % len(MARKERS)],
            "linestyle": LINES[j % len(LINES)] if is_family else "-",
        }
    return styles


def scale(axes, which, values, *, log=None):
    """Makes the axis "x" or "y" logarithmic if the values span much, or if `log`."""
    low, high = min(values), max(values)
    if (low > 0 and high / low > 5) if log is None else log:
        axes.set(**{f"{which}scale": "log"})
        readable_log(getattr(axes, f"{which}axis"), high / low)


def readable_log(axis, ratio):
    """Ticks of a logarithmic axis whose ends have this ratio: enough to read values off."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    subs = (1,) if ratio > 1000 else (1, 2, 5) if ratio > 10 else (1, 1.5, 2, 3, 4, 6, 8)
    axis.set_major_locator(MaxNLocator(6) if ratio < 2 else LogLocator(subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda value, _: plain(value)))
    axis.set_minor_formatter(NullFormatter())


def plain(value):
    """A number as text: 0.05, 1,000, and powers of ten from 100,000 on."""
    if value < 100_000:
        return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
    digits, power = f"{value:.0e}".split("e")
    first = "" if digits == "1" else rf"{digits} \cdot "
    return f"${first}10^{{{int(power)}}}$"


def step_axis(axes, curves, count):
    """The x axis of training steps: at most so many ticks, none behind the last step."""
    from matplotlib.ticker import MaxNLocator

    last = max(curve.x[-1] for curve in curves)
    ticks = MaxNLocator(count, steps=[1, 2, 4, 5, 10]).tick_values(0, last)
    ticks = [tick for tick in ticks if 0 <= tick <= last]
    in_thousands = last >= 10_000
    texts = [f"{tick / 1000:g}K" if in_thousands and tick else f"{tick:,g}" for tick in ticks]
    axes.set_xticks(ticks, texts)


def draw(axes, curves, styles, *, start=None):
    """Draws curves with error bars, and leaves room for `name_ends`.

    start: where the x axis starts; None: a bit before the first point.
    """
    for curve in curves:
        axes.errorbar(curve.x, curve.y, yerr=errors(curve), **styles[curve.name])
    axes.figure.draw_without_rendering()
    width = 0.62 * FONT_SIZE * max(len(curve.name) for curve in curves) + 18  # points
    share = min(width / _points(axes, axes.get_window_extent().width), 0.6)
    transform = axes.xaxis.get_transform()
    x = np.array([value for curve in curves for value in curve.x], float)
    low, high = transform.transform(np.array([x.min(), x.max()]))
    low = low - 0.03 * (high - low) if start is None else start
    ends = np.array([low, low + (high - low) / (1 - share)])
    if high > low:
        axes.set_xlim(*transform.inverted().transform(ends))


def errors(curve):
    """The length of the error bar at each point; None if the curve has no error bars."""
    return [each or 0 for each in curve.deviations] if any(curve.deviations) else None


def name_ends(axes, curves, styles):
    """Writes the name of each curve beside its last point, moved apart where they would overlap.

    Call it when all of the figure is drawn: names are placed where the points are now.
    """
    axes.figure.draw_without_rendering()  # ends the layout
    pixels = [axes.transData.transform((curve.x[-1], curve.y[-1]))[1] for curve in curves]
    bottom, top = (_points(axes, y) for y in (axes.bbox.y0, axes.bbox.y1))
    ends = _points(axes, np.array(pixels))
    places = spread(ends, gap=1.1 * FONT_SIZE, low=bottom + FONT_SIZE / 2, high=top)
    leader = bool(np.max(np.abs(places - ends)) > FONT_SIZE)
    for curve, shift in zip(curves, places - ends, strict=True):
        color, point = styles[curve.name]["color"], (curve.x[-1], curve.y[-1])
        note(axes, curve.name, point, (18 if leader else 9, shift), color, leader=leader)


def note(axes, text, point, offset, color, across="left", *, leader=False):
    """Writes text beside a point, in points away from it. The layout does not know of it.

    leader: with a thin line from the point to the text.
    """
    from matplotlib.patheffects import withStroke

    line = {"arrowstyle": "-", "color": color, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 3}
    line["relpos"] = (0 if across == "left" else 1, 0.5)  # where it meets the text
    annotation = axes.annotate(
        text,
        point,
        xytext=offset,
        textcoords="offset points",
        color=color,
        ha=across,
        va="center",
        fontsize=FONT_SIZE - 1,
        annotation_clip=False,
        arrowprops=line if leader else None,
        path_effects=[withStroke(linewidth=2, foreground="white")],
    )
    annotation.set_in_layout(False)
    return annotation


def box_of(note):
    """The box of a note's text in pixels, without its leader."""
    from matplotlib.text import Text

    note.get_window_extent()  # with the leader; it moves the text to where it will be
    return Text.get_window_extent(note)


def spread(places, *, gap, low, high):
    """Moves places until neighbours are at least `gap` apart.

    The order stays, and the sum of the squared moves is as small as it can be. Then all places are
    moved into low .. high, if there is room.
    """
    from scipy import optimize

    order, steps = np.argsort(places, kind="stable"), gap * np.arange(len(places))
    # With i * gap taken away from place i, places that are far enough apart still rise.
    means = optimize.isotonic_regression(np.asarray(places, float)[order] - steps).x
    moved = np.maximum(np.minimum(means, high - steps[-1]), low) + steps
    result = np.empty(len(places))
    result[order] = moved
    return result


def name_points(axes, points, names, styles, curves=()):
    """Writes a name beside each point (x, y), on the side where it covers least.

    curves: what the names should not cover either.
    """
    axes.figure.draw_without_rendering()
    points = np.asarray(points, float)
    places = axes.transData.transform(points)
    drawn = [_along(axes.transData.transform(np.column_stack([c.x, c.y]))) for c in curves]
    drawn, taken = np.concatenate([places, *drawn]), []
    for point, own, name in zip(points, places, names, strict=True):
        options = []
        for dx, dy, across in SIDES:
            color, is_far = styles[name]["color"], abs(dx) > 9
            text = note(axes, name, point, (dx, dy), color, across, leader=is_far)
            box = box_of(text)
            cost = _covered(box, drawn, taken, axes) + 2 * _is_ambiguous(box, own, places)
            options.append((cost, len(options), text, box))
        options.sort(key=lambda option: option[:2])
        taken.append(options[0][3])
        for _, _, text, _ in options[1:]:
            text.remove()


def _points(axes, pixels):
    return pixels * POINTS / axes.figure.dpi


def _along(corners):
    """Places on a line through corners (N, 2), close to each other."""
    where = np.linspace(0, len(corners) - 1, 20 * len(corners))
    return np.column_stack([np.interp(where, range(len(corners)), axis) for axis in corners.T])


def _covered(box, drawn, names, axes):
    """How much the box of a name covers: what is drawn, other names, the outside of the axes."""
    area, margin = box.width * box.height, 3 * axes.figure.dpi / POINTS
    near = (_distances(box, drawn) < margin).sum()
    outside = 1 - _overlap(box, axes.bbox) / area
    return near + 10 * sum(_overlap(box, name) for name in names) / area + 100 * outside


def _is_ambiguous(box, own, places):
    """Whether the text in the box is nearer to another point than to its own."""
    return _distances(box, places).min() < 0.99 * _distances(box, own[None])[0]


def _distances(box, places):
    """The distances (N,) from a box to points (N, 2); 0 for a point inside the box."""
    return np.hypot(*(places - np.clip(places, box.min, box.max)).T)


def _overlap(a, b):
    width = min(a.x1, b.x1) - max(a.x0, b.x0)
    height = min(a.y1, b.y1) - max(a.y0, b.y0)
    return max(width, 0) * max(height, 0)
