"""The record of a run: metrics.jsonl, progress on the terminal, the curves of loss and scores."""

import json

import numpy as np
from absl import logging
from tqdm import tqdm

from dit_jax.errors import UserError
from dit_jax.evals import drawing
from dit_jax.machine import disk

SCORES = {  # fields of the record that `scoring` adds -> their titles
    "frechet_distance": "Frechet distance (classifier features)",
    "kid": "KID (classifier features)",
}
LOSSES = {"mse": "MSE of the prediction", "vb": "variational bound (bits)"}


def make_log(
    path,
    *,
    start,
    total_steps,
    batch_size,
    flops_per_step,
    peak_flops,
    saved,
    measured=None,
    shown="loss",
):
    """log(step, means, seconds) for `loop.run`: one JSON line, and progress on the terminal.

    It returns the line as a dict on process 0, None on the others. Lines of steps after `start`,
    left by a killed run, are dropped first. peak_flops: FLOP/s of all devices, None if unknown;
    then there is no MFU. saved() is the newest saved step, None before the first. measured: more
    fields for the line of step `start`, or None. shown: the metric that the terminal shows.
    """
    import jax  # here: commands read a record before they import jax

    if jax.process_index() != 0:
        return lambda step, means, seconds: None  # process 0 writes
    path = disk.path(path)
    records = [record for record in read(path) if record["step"] <= start] if start else []
    if measured and records and records[-1]["step"] == start:
        records[-1] |= measured
    text = "".join(json.dumps(record) + "\n" for record in records)
    disk.write_text(path, text)
    unwritten = ""  # lines that a full disk refused
    bar = tqdm(total=total_steps, initial=start, unit="step", disable=None)  # on a terminal only

    def log(step, means, seconds):
        nonlocal text, unwritten
        record = {"step": step, **means, "images_per_second": batch_size / seconds}
        record["model_tflops_per_second"] = flops_per_step / seconds / 1e12
        if peak_flops:
            record["mfu"] = flops_per_step / seconds / peak_flops
        record["seconds_left"] = (total_steps - step) * seconds
        record["saved"] = saved()
        unwritten += json.dumps(record) + "\n"
        with disk.only_warned(f"{path} could not be written"):
            text, unwritten = disk.append(path, unwritten, after=text), ""
        bar.set_postfix_str(f"{shown} {means[shown]:.4f}, {batch_size / seconds:.0f} images/s")
        bar.update(step - bar.n)
        if bar.disable:
            logging.info(
                "step %d/%d  %s %.4f  %.0f images/s  %.0f %% waiting for data  %.1f ms/step  "
                "%.0f s left",
                *(step, total_steps, shown, means[shown], batch_size / seconds),
                100 * means["data_wait"],
                *(1000 * seconds, record["seconds_left"]),
            )
        if step == total_steps:
            bar.close()
        return record

    return log


def read(path):
    """The records of a metrics.jsonl, without a truncated last line."""
    path = disk.path(path)
    text = path.read_bytes().decode(errors="replace") if disk.exists(path) else ""
    lines = [line for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [_parse(line, f"line {number} of {path}") for number, line in enumerate(lines, 1)]


def _parse(line, where):
    try:
        record = json.loads(line)
        int(record["step"])
    except (ValueError, TypeError, KeyError):
        raise UserError(
            f"{where} must be a record in JSON with a step, got {line.strip()[:40]!r}: repair or "
            "delete it"
        ) from None
    return record


def plot_losses(metrics_path, png_path):
    """Plots the MSE of the prediction and the variational bound over the steps, and smoothed."""
    records = read(metrics_path)
    names = [name for name in LOSSES if records and name in records[0]]
    if not names:  # before the first log
        return
    figure, panels = _make_figure(metrics_path, f"loss to step {records[-1]['step']}", len(names))
    for axes, name in zip(panels, names, strict=True):
        steps, means = curve(records, name)
        style = {"color": "tab:blue", "marker": "o" if len(steps) == 1 else None}  # else invisible
        axes.plot(steps, means, **style, alpha=0.3, label="mean since the last log")
        axes.plot(steps, smooth(means), **style, label="smoothed")
        _finish(axes, LOSSES[name], steps, means)
        axes.legend(frameon=False)
    _write(figure, png_path)


def plot_scores(metrics_path, png_path):
    """Plots the SCORES over the steps, one panel each."""
    records = [each for each in read(metrics_path) if SCORES.keys() <= each.keys()]
    if not records:  # before the first score
        return
    text = f"scores of the EMA to step {records[-1]['step']}"
    figure, panels = _make_figure(metrics_path, text, len(SCORES))
    for axes, (name, title) in zip(panels, SCORES.items(), strict=True):
        steps, values = ([each[key] for each in records] for key in ("step", name))
        axes.plot(steps, values, color="tab:blue", marker="o", markersize=4, clip_on=False)
        _finish(axes, title, steps, values)
    _write(figure, png_path)


def _make_figure(metrics_path, text, count):
    """(a figure, its `count` panels side by side), titled with the name of the run and a text."""
    from matplotlib.figure import Figure  # here, since it takes half a second

    figure = Figure(figsize=(6 * count, 4), layout="constrained")
    figure.suptitle(f"{disk.path(metrics_path).parent.name}: {text}")
    return figure, [figure.add_subplot(1, count, i + 1) for i in range(count)]


def _finish(axes, title, steps, values):
    """Labels a panel and its axes; the vertical one is logarithmic if all values are above 0."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.set(title=title, xlabel="step", ylabel=title)
    axes.set_xlim(0, steps[-1])
    if min(values) > 0:
        axes.set_yscale("log")
        drawing.readable_log(axes.yaxis, max(values) / min(values))
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.grid(alpha=0.3)


def _write(figure, png_path):
    with disk.path(png_path).open("wb") as file:
        figure.savefig(file, dpi=120, format="png")


def curve(records, name):
    """(steps, means) of a metric in the records that have it, each over at least the usual steps.

    A record covers the steps since the record before. After a stop or a save these are few, and
    their mean would be a spike in the curve; such records are merged with the next ones.
    """
    records = [each for each in records if isinstance(each.get(name), int | float)]
    if not records:
        return [], []
    counts = np.diff([0, *(record["step"] for record in records)])
    usual, steps, means = np.median(counts), [], []
    total = joined = 0
    for record, count in zip(records, counts, strict=True):
        total, joined = total + count * record[name], joined + count
        if joined >= usual:
            steps.append(record["step"])
            means.append(total / joined)
            total = joined = 0
    return steps, means


def smooth(means):
    """Medians over a window of a tenth of the values, then their means over the same window.

    At the ends the window is cut off. The median removes single spikes.
    """
    half = len(means) // 20
    for reduce in (np.median, np.mean):
        means = [float(reduce(means[max(0, i - half) : i + half + 1])) for i in range(len(means))]
    return means
