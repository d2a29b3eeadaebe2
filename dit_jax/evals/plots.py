"""Pictures of scores: against guidance, steps, compute and the size of a model.

Data are plain: receipts of dit-evaluate as dicts, and `scaling.Run`s, from few to many Gflops.
"""

import numpy as np

from dit_jax.evals import drawing, scaling
from dit_jax.evals.drawing import Curve
from dit_jax.machine import words

FIELDS = {  # what a sweep varies -> the label of its axis
    "cfg_scale": "guidance scale",
    "num_steps": "steps of sampling",
    "ema_width": "width of the average of the parameters",
}
DESIGNS = {  # of a block: the names of fig. 5
    "in_context": "in-context",
    "cross_attention": "cross-attention",
    "adaln": "adaLN",
    "adaln_zero": "adaLN-Zero",
}


def sweep(path, entries, *, field, score):
    """Score against a swept value, a curve for each run, and the best point of each marked.

    entries: dicts of run (a path), value (a number, or a word) and receipt.
    """
    values = [entry["value"] for entry in entries]
    is_number = all(_number(value) is not None for value in values)
    texts = [] if is_number else list(dict.fromkeys(values))

    def place(entry):
        return texts.index(entry["value"]) if texts else _number(entry["value"])

    curves = _curves_of_runs(entries, place, score)
    styles = drawing.styles_of([curve.name for curve in curves])
    if texts:  # nothing is between them
        styles = {name: style | {"linestyle": "none"} for name, style in styles.items()}
    with drawing.picture(path, height=3.6) as figure:
        axes = _axes(figure, FIELDS.get(field, field), score, curves)
        if texts:
            axes.set_xticks(range(len(texts)), map(str, texts))
        else:
            _swept_axis(axes, sorted({place(entry) for entry in entries}))
        axes.margins(y=0.15)
        drawing.draw(axes, curves, styles)
        for curve in curves:
            _mark_best(axes, curve, styles[curve.name]["color"], scaling.lower_is_better(score))
        drawing.name_ends(axes, curves, styles)


def sampling_calls(path, entries, *, score):
    """Score against the network calls for a sample, a curve for each run of `sweep`'s entries."""
    curves = _curves_of_runs(entries, lambda entry: scaling.calls(entry["receipt"]), score)
    _draw_compute(path, "network calls for a sample", curves, score)


def sampling_seconds(path, entries, *, score):
    """Score against the seconds for a sample, which each of `sweep`'s entries has as `seconds`."""
    curves = _curves_of_runs(entries, lambda entry: entry["seconds"], score)
    _draw_compute(path, "seconds for a sample", curves, score)


def sampling_compute(path, receipts, *, score):
    """Fig. 10: score against the Gflops of sampling one image, a curve for each checkpoint."""
    groups = {}
    for receipt in sorted(receipts, key=_sampling_gflops):
        groups.setdefault(receipt["samples"]["path"], []).append(receipt)
    groups = dict(sorted(groups.items(), key=lambda item: item[1][0]["model"]["gflops"]))
    names = [group[0]["model"]["name"].removeprefix("DiT-") for group in groups.values()]
    if len(set(names)) < len(names):
        names = words.ends(groups)
    curves = [
        _curve(name, map(_sampling_gflops, group), group, score)
        for name, group in zip(names, groups.values(), strict=True)
    ]
    _draw_compute(path, "compute of sampling (Gflops per image)", curves, score)


def model_compute(path, runs, *, step, score):
    """Fig. 8: score against model Gflops, with the line in log-log and the correlation."""
    names, x = [run.model for run in runs], [run.gflops for run in runs]
    points = [_curve(run.model, [run.gflops], [run.receipt_at(step)], score) for run in runs]
    styles = drawing.styles_of(names)
    with drawing.picture(path, height=3.8) as figure:
        axes = _axes(figure, "model compute (Gflops of a forward pass)", score, points)
        drawing.scale(axes, "x", x, log=True)
        trend = scaling.trend(x, [point.y[0] for point in points])
        if trend:
            _draw_trend(axes, x, trend)
        for point in points:
            style = styles[point.name] | {"linestyle": "none"}
            axes.errorbar(point.x, point.y, yerr=drawing.errors(point), **style)
        axes.margins(0.08, 0.12)
        drawing.name_points(axes, [(*p.x, *p.y) for p in points], names, styles)


def training_compute(path, runs, *, score):
    """Fig. 9: score against the Gflops of training, a curve for each model."""
    curves = [
        _curve(run.model, map(run.training_gflops, run.steps), run.receipts, score) for run in runs
    ]
    _draw_compute(path, "compute of training (Gflops)", curves, score)


def training(path, runs, *, score):
    """Fig. 6: score over the steps; a panel for each patch with all sizes, and the other way."""
    patches, sizes = ({getattr(run, name): None for run in runs} for name in ("patch_size", "size"))
    rows = [
        [_panel(f"patch {patch}", runs, "patch_size", patch, "size") for patch in patches],
        [_panel(f"size {size}", runs, "size", size, "patch_size") for size in sizes],
    ]
    rows = [[panel for panel in row if len(panel[1]) > 1] for row in rows]
    rows = [row for row in rows if row] or [[("", {run.model: run for run in runs})]]
    styles = drawing.styles_of([run.model for run in runs])
    columns = max(map(len, rows))
    values = [scaling.value(receipt, score) for run in runs for receipt in run.receipts]
    with drawing.picture(path, height=2.3 * len(rows)) as figure:
        grid = figure.subplots(len(rows), columns, sharex=True, sharey=True, squeeze=False)
        figure.supylabel(_title(score), fontsize=drawing.FONT_SIZE)
        figure.supxlabel("training steps", fontsize=drawing.FONT_SIZE)
        drawing.scale(grid[0, 0], "y", values)
        drawn = []
        for row, panels in zip(grid, rows, strict=True):
            for axes in row[len(panels) :]:
                axes.set_axis_off()
            for axes, (title, members) in zip(row, panels, strict=False):
                axes.set_title(title)
                curves = [_over_steps(name, run, score) for name, run in members.items()]
                drawn.append((axes, curves, {n: styles[r.model] for n, r in members.items()}))
                drawing.draw(*drawn[-1], start=0)
                drawing.step_axis(axes, curves, 3)
        for each in drawn:
            drawing.name_ends(*each)


def designs(path, runs, *, score, over_time=False):
    """Fig. 5: score over the steps, or the time, of training, for the designs of one model.

    The mean of several seeds has a band of one standard deviation.
    """
    names = [DESIGNS.get(run.design, run.design) for run in runs]
    curves = [_over_steps(name, run, score) for name, run in zip(names, runs, strict=True)]
    styles, label = drawing.styles_of(names), "training steps"
    if over_time:
        unit, size = scaling.time_unit([run.seconds_at(run.steps[-1]) for run in runs])
        times = [[run.seconds_at(step) / size for step in run.steps] for run in runs]
        curves = [curve._replace(x=x) for curve, x in zip(curves, times, strict=True)]
        label = f"{unit} of training"
    with drawing.picture(path, height=3.6) as figure:
        axes = _axes(figure, label, score, curves)
        axes.set_title(runs[0].model)
        for i, run in enumerate(runs):
            if run.seeds > 1:
                curves[i] = _draw_band(axes, curves[i], styles[names[i]]["color"])
        drawing.draw(axes, curves, styles, start=0)
        drawing.step_axis(axes, curves, 6)
        drawing.name_ends(axes, curves, styles)


def growth(path, panels):
    """Seconds of a step, a panel for each {label: (x, seconds, FLOPs)}; both axes logarithmic.

    A second curve is in proportion to the FLOPs, and meets the last time.
    """
    names = ("measured", "as the FLOPs")
    styles = drawing.styles_of(names)
    with drawing.picture(path, height=3.2) as figure:
        grid = figure.subplots(1, len(panels), squeeze=False)[0]
        for axes, (label, (x, seconds, work)) in zip(grid, panels.items(), strict=True):
            counted = [seconds[-1] * each / work[-1] for each in work]
            for name, y in zip(names, (seconds, counted), strict=True):
                axes.plot(x, y, label=name, **styles[name])
            drawing.scale(axes, "y", seconds + counted, log=True)
            axes.set_xscale("log")
            axes.minorticks_off()
            axes.set_xticks(x, [f"{value:,}" for value in x])
            axes.set(xlabel=label, ylabel="seconds of a training step")
        grid[0].legend(frameon=False)


def losses(path, losses, *, name="training loss"):
    """Losses over the steps. losses: {name of the run: (steps, smoothed losses)}."""
    curves = [Curve(run, *points, [None] * len(points[0])) for run, points in losses.items()]
    styles = {run: style | {"marker": None} for run, style in drawing.styles_of(losses).items()}
    late = [_late(curve) for curve in curves]
    low, high = min(map(min, late)), max(map(max, late))
    with drawing.picture(path, height=3.8) as figure:
        axes = figure.subplots()
        axes.set(xlabel="training steps", ylabel=name)
        drawing.scale(axes, "y", [low, high], log=True)
        drawing.draw(axes, curves, styles, start=0)
        axes.set_ylim(low / (high / low) ** 0.05, high)
        drawing.step_axis(axes, curves, 6)
        drawing.name_ends(axes, curves, styles)


def _late(curve):
    """The values of a curve without its first twentieth, whose fall would hide the rest."""
    return [y for x, y in zip(curve.x, curve.y, strict=True) if x >= 0.05 * curve.x[-1]]


def _draw_band(axes, curve, color):
    """A band of one deviation around a curve; returns the curve without error bars."""
    y, deviations = np.array(curve.y), np.array(curve.deviations)
    axes.fill_between(curve.x, y - deviations, y + deviations, color=color, alpha=0.2, linewidth=0)
    return curve._replace(deviations=[None] * len(curve.y))


def _draw_compute(path, label, curves, score):
    """Curves of a score against compute, on a logarithmic axis."""
    with drawing.picture(path, height=3.8) as figure:
        axes = _axes(figure, label, score, curves)
        drawing.scale(axes, "x", [x for curve in curves for x in curve.x], log=True)
        names = [curve.name for curve in curves]
        styles = drawing.styles_of(names)
        drawing.draw(axes, curves, styles)
        ends = [(curve.x[-1], curve.y[-1]) for curve in curves]
        drawing.name_points(axes, ends, names, styles, curves)


def _draw_trend(axes, x, trend):
    """The line in log-log, and what it says."""
    text = f"correlation {trend.correlation:.2f}".replace("-", "\N{MINUS SIGN}")
    if trend.exponent is not None:
        ends = np.geomspace(min(x), max(x), 100)  # the y axis may be linear
        line = trend.factor * ends**trend.exponent
        axes.plot(ends, line, color=drawing.GREY, linestyle="--", linewidth=1, zorder=1)
        text += f"\nscore ∝ Gflops$^{{{trend.exponent:.2f}}}$"
    right = trend.correlation < 0  # where a falling line leaves room
    axes.text(
        0.98 if right else 0.02,
        0.97,
        text,
        transform=axes.transAxes,
        ha="right" if right else "left",
        va="top",
        color=drawing.GREY,
    )


def _mark_best(axes, curve, color, low):
    """A ring around the best point, and its score beyond the error bar."""
    best = (np.argmin if low else np.argmax)(curve.y)
    x, y, deviation = curve.x[best], curve.y[best], curve.deviations[best] or 0
    axes.plot(x, y, "o", color=color, markersize=10, fillstyle="none", markeredgewidth=1.2)
    end = (x, y - deviation) if low else (x, y + deviation)
    away = 7 if deviation else 12
    is_first = x == min(curve.x) < max(curve.x)
    across, aside = ("left", -6) if is_first else ("center", 0)  # not over the axis
    drawing.note(axes, f"{y:#.3g}", end, (aside, -away if low else away), color, across)


def _swept_axis(axes, values):
    """Ticks at the swept values; logarithmic if these span much."""
    if values[0] > 0 and values[-1] / values[0] >= 8:
        axes.set_xscale("log")
        axes.minorticks_off()
    axes.set_xticks(values, [f"{value:g}" for value in values])


def _axes(figure, label, score, curves):
    """Axes for a score of curves, with both labels."""
    axes = figure.subplots()
    axes.set(xlabel=label, ylabel=_title(score))
    drawing.scale(axes, "y", [y for curve in curves for y in curve.y])
    return axes


def _curve(name, x, receipts, score):
    y = [scaling.value(receipt, score) for receipt in receipts]
    return Curve(name, list(x), y, [scaling.deviation(receipt, score) for receipt in receipts])


def _curves_of_runs(entries, place, score):
    """One curve for each run of a sweep. place(entry): its position on the x axis."""
    groups = {}
    for entry in sorted(entries, key=place):
        groups.setdefault(entry["run"], []).append(entry)
    return [
        _curve(name, map(place, group), [entry["receipt"] for entry in group], score)
        for name, group in zip(words.ends(groups), groups.values(), strict=True)
    ]


def _over_steps(name, run, score):
    return _curve(name, run.steps, run.receipts, score)


def _panel(title, runs, field, value, other):
    """(title, {name: run}) of the runs with that value of a field, named by another field."""
    mark = "/" if other == "patch_size" else ""
    members = [run for run in runs if getattr(run, field) == value]
    return title, {f"{mark}{getattr(run, other)}": run for run in members}


def _sampling_gflops(receipt):
    model = receipt["model"]
    return model.get("sampling_gflops") or model["gflops"] * model["passes"]


def _number(value):
    """A swept value as a number, also the steps in "ddim50"; None if it is a word."""
    try:
        return float(str(value).removeprefix("ddim"))
    except ValueError:
        return None


def _title(score):
    """The name of a score with an arrow to where good scores are."""
    return f"{score} {'↓' if scaling.lower_is_better(score) else '↑'}"
