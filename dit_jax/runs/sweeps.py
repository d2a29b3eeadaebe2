"""Judges runs with several values of one or two options of sampling, and plots their scores.

The option ema_width is the width of an average of the run's parameters.
"""

import dataclasses
import functools
import json
import statistics

import jax
from absl import logging

from dit_jax.errors import UserError
from dit_jax.evals import plots, scaling
from dit_jax.machine import cluster, disk
from dit_jax.runs import averages, bench, evaluate, snapshots
from dit_jax.sampling import trained

REPEATS = 5  # of `time_samples`


def run(request, paths, swept, out, command, *, timed=False):
    """Judges every run with every choice; writes OUT/sweep.json and pictures.

    These are OUT/sweep.png and, for numbers of steps, OUT/sampling_compute.png; for numbers of
    steps and another option OUT/sampling_calls.png. timed: also times all of them, in turn, for
    OUT/sampling_seconds.png.

    swept: dicts of the same options, of sampling or ema_width. OUT/RUN/NAME=VALUE, or
    NAME=VALUE,NAME=VALUE, has the receipt and the features of each, which are not computed again;
    OUT/RUN/averages has the averages.
    """
    results, requests = [], []
    for label, path in zip(labels(paths), paths, strict=True):
        each = dataclasses.replace(request, samples=str(path))
        for chosen, asked in zip(swept, _requests(each, swept, out / label), strict=True):
            text = ",".join(f"{name}={value}" for name, value in chosen.items())
            logging.info("%s with %s", path, text)
            found = evaluate.run(asked, out / label / text, command, kept_in=path)
            results.append({"run": label, "options": chosen, "receipt": found})
            requests.append(asked)
    if timed:
        for result, seconds in zip(results, time_samples(requests), strict=True):
            result["seconds"] = seconds
    if jax.process_index() == 0:
        _draw(results, list(swept[0]), out)


def _draw(results, names, out):
    """Writes the table and the pictures of judged choices of one or two options."""
    axis = "num_steps" if "num_steps" in names else names[-1]
    results = [each | {"value": each["options"][axis]} for each in results]
    disk.write_text(out / "sweep.json", json.dumps(results, indent=2) + "\n")
    score = next(iter(results[0]["receipt"]["scores"]))  # the Frechet distance
    entries = [each | {"run": "/".join([each["run"], *_others(each, axis)])} for each in results]
    if len(names) > 1:
        print(table(entries, axis, score, lambda entry: scaling.value(entry["receipt"], score)))
    if len(names) > 1 and axis == "num_steps":
        plots.sampling_calls(out / "sampling_calls.png", entries, score=score)
    else:
        plots.sweep(out / "sweep.png", entries, field=axis, score=score)
    if "seconds" in results[0]:
        print(table(entries, axis, "seconds for a sample", lambda entry: entry["seconds"]))
        plots.sampling_seconds(out / "sampling_seconds.png", entries, score=score)
    if names == ["num_steps"]:  # fig. 10 of the paper
        receipts = [each["receipt"] for each in results]
        plots.sampling_compute(out / "sampling_compute.png", receipts, score=score)
    logging.info("pictures: %s", out)


def _others(result, axis):
    """The options that are not on the axis, as texts: words alone, numbers with their option."""
    options = {name: value for name, value in result["options"].items() if name != axis}
    return [v if isinstance(v, str) else f"{name}={v}" for name, v in options.items()]


def time_samples(requests):
    """The median seconds for a sample of each Request: a batch of each, in turn, REPEATS times.

    The first round, which compiles, does not count. Decoding does.
    """
    load, draws, sizes = functools.cache(trained.load), {}, []
    for i, request in enumerate(requests):
        drawn = evaluate.open_samples(request, load)
        draws[i] = functools.partial(drawn.read, 0, drawn.at_once)
        sizes.append(drawn.at_once)
    seconds, _ = bench.time_in_turn(draws, REPEATS, warmup=1)
    return [statistics.median(seconds[i]) / size for i, size in enumerate(sizes)]


def table(entries, axis, title, find):
    """The text of a table: a row for each run and other option, a column for each value.

    find(entry): the number of a cell.
    """
    found = {}
    for each in entries:
        cells = found.setdefault(each["run"], {})
        cells[str(each["value"])] = f"{find(each):.4g}"
    heads = list(dict.fromkeys(str(each["value"]) for each in entries))
    width = max(map(len, [axis, *found]))
    rows = {axis: dict(zip(heads, heads, strict=True))} | found
    lines = [
        "  ".join([f"{name:{width}}", *(f"{cells[head]:>8}" for head in heads)])
        for name, cells in rows.items()
    ]
    return "\n".join([title, *lines])


def _requests(request, swept, out):
    """The Request of each choice, after the averages that they need are written."""
    widths = list(dict.fromkeys(each["ema_width"] for each in swept if "ema_width" in each))
    if widths:
        with cluster.together():
            if jax.process_index() == 0:
                averages.write(request.samples, widths, out / snapshots.FOLDER)
    requests = []
    for chosen in swept:
        options = {name: value for name, value in chosen.items() if name != "ema_width"}
        each = dataclasses.replace(request, sampling=request.sampling | options)
        if widths:
            path = averages.path_of(out / snapshots.FOLDER, chosen["ema_width"])
            each = dataclasses.replace(each, samples=str(path))
        requests.append(each)
    return requests


def labels(paths):
    """A folder name for each run: its own, or with its parent's where two are the same."""
    names = [disk.absolute(path).name for path in paths]
    if len(set(names)) < len(names):
        names = ["-".join(disk.absolute(path).parts[-2:]) for path in paths]
    if len(set(names)) < len(names):
        raise UserError(f"--sweep must be given each run once, got {', '.join(map(str, paths))}")
    return names
