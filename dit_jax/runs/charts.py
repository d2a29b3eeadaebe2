"""The curves of runs as figures of Plotly: dicts of JSON, which its script draws in a browser."""

import math

import numpy as np

from dit_jax.evals import drawing
from dit_jax.runs import record

MAX_POINTS = 1000  # of all runs together, in one curve each
LEAST_POINTS = 100  # of one run
RECORDED = {  # field of the record -> title, factor, whether its axis is logarithmic
    **{name: (title, 1, True) for name, title in record.LOSSES.items()},
    "loss": ("loss", 1, True),
    "grad_norm": ("gradient norm", 1, True),
    "images_per_second": ("images/s", 1, False),
    "mfu": ("MFU (%)", 100, False),
    "data_wait": ("time spent waiting for data (%)", 100, False),
}
RAW, SMOOTHED = "mean since the last log", "smoothed"
STEPS = {"tickformat": ",d", "ticklabeloverflow": "allow", "nticks": 6}
APART = {"ticks": "outside", "ticklen": 5, "tickcolor": "rgba(0, 0, 0, 0)"}  # labels from axes
GRID, TEXT, EVENT = "#e6e6e6", "#333333", "#999999"


def make(runs):
    """[(title, figure)] of Summaries: those metrics and scores that at least one run has."""
    figures = []
    for name in _names(runs):
        title, factor, log = RECORDED[name]
        curves = [record.curve(run.records, name) for run in runs]
        traces = _traces(runs, curves, factor)
        figures.append((title, _figure(title, traces, runs, log=log)))
    for name, title in record.SCORES.items():
        points = [_recorded_scores(run, name) for run in runs]
        figures += _score_figure(title, points, runs)
    for name in dict.fromkeys(
        name for run in runs for _, x in run.receipts for name in x["scores"]
    ):
        points = [_receipt_scores(run, name) for run in runs]
        if any(len(steps) > 1 for steps, _ in points):
            figures += _score_figure(f"{name}, of receipts", points, runs)
    return figures


def color(index):
    """The colour of a run by its place."""
    return drawing.COLORS[index % len(drawing.COLORS)]


def _names(runs):
    """The fields to draw; the loss only if its parts are unknown."""
    known = {name for run in runs for each in run.records for name in each}
    return [
        name
        for name in RECORDED
        if name in known and not (name == "loss" and known & record.LOSSES.keys())
    ]


def _traces(runs, curves, factor):
    """For each run its means, pale, and over them its smoothed means."""
    traces = []
    limit = max(LEAST_POINTS, MAX_POINTS // len(runs))
    for i, (run, (steps, means)) in enumerate(zip(runs, curves, strict=True)):
        if not steps:
            continue
        steps, means = thin(steps, [factor * x for x in means], limit)
        names = (RAW, SMOOTHED) if len(runs) == 1 else (f"{run.name}, {RAW}", run.name)
        mode = "markers" if len(steps) == 1 else "lines"
        raw = _trace(names[0], steps, means, mode, i) | {"opacity": 0.5}
        smoothed = _trace(names[1], steps, record.smooth(means), mode, i)
        raw["line"] = raw["line"] | {"width": 1}
        if len(runs) > 1:  # one entry of the legend shows and hides both
            raw |= {"showlegend": False, "hoverinfo": "skip", "legendgroup": run.name}
            smoothed["legendgroup"] = run.name
        traces += [raw, smoothed]
    return traces


def _recorded_scores(run, name):
    points = [(each["step"], each[name]) for each in run.records if name in each]
    return tuple(zip(*points, strict=True)) if points else ((), ())


def _receipt_scores(run, name):
    """(steps, values) of the newest receipt of each step, if it has the score."""
    points = {}
    for _, receipt in run.receipts:
        if name in receipt["scores"] and receipt["samples"].get("step") is not None:
            points[receipt["samples"]["step"]] = receipt["scores"][name]["value"]
    return tuple(points), tuple(points.values())


def _score_figure(title, points, runs):
    """[(title, figure)] of the scores of runs, [] if there are none."""
    traces = [
        _trace(run.name, steps, values, "lines+markers", i)
        for i, (run, (steps, values)) in enumerate(zip(runs, points, strict=True))
        if steps
    ]
    values = [value for _, values in points for value in values]
    if not values:
        return []
    log = min(values) > 0 and max(values) > 5 * min(values)
    return [(title, _figure(title, traces, runs, log=log))]


def _trace(name, steps, values, mode, index):
    rounded = [float(f"{x:.4g}") if math.isfinite(x) else None for x in values]
    return {
        "type": "scatter",
        "name": name,
        "x": [int(step) for step in steps],
        "y": rounded,
        "mode": mode,
        "line": {"color": color(index), "width": 2},
        "marker": {"color": color(index), "size": 7},
    }


def _figure(title, traces, runs, *, log):
    values = [y for trace in traces for y in trace["y"] if y is not None]
    axis = {"gridcolor": GRID, "zeroline": False, "automargin": True} | APART
    y = {"rangemode": "tozero", "exponentformat": "none", "separatethousands": True}
    if log and values and min(values) > 0:
        ratio = max(values) / min(values)
        y = {"type": "log", "dtick": "D1" if ratio < 5 else "D2" if ratio < 300 else 1}
        y |= {"tickformat": "~g"} if ratio < 300 else {"exponentformat": "power"}
    layout = {
        "margin": {"l": 48, "r": 24, "t": 8, "b": 40},
        "font": {"family": "system-ui, sans-serif", "size": 12, "color": TEXT},
        "hovermode": "x unified",
        "showlegend": len(traces) > 1 or len(runs) > 1,
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        "xaxis": axis | {"title": {"text": "step"}, "rangemode": "tozero"} | STEPS,
        "yaxis": axis | y,
        "shapes": _event_lines(runs[0]) if len(runs) == 1 else [],
    }
    return {"data": traces, "layout": layout}


def _event_lines(run):
    """A dotted line at each resume and rollback of a run."""
    found = {each["step"] for each in run.events if each["event"] in ("resumed", "rolled back")}
    line = {"color": EVENT, "width": 1, "dash": "dot"}
    ends = {"type": "line", "xref": "x", "yref": "paper", "y0": 0, "y1": 1, "layer": "below"}
    return [{**ends, "x0": step, "x1": step, "line": line} for step in sorted(found)]


def thin(steps, values, limit):
    """At most `limit` points of a curve: each is the mean of as many neighbours."""
    size = -(-len(values) // limit)
    starts = range(0, len(values), size)
    means = [float(np.mean(values[i : i + size])) for i in starts]
    return [steps[min(i + size, len(steps)) - 1] for i in starts], means
