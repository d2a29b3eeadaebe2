"""Judges runs with each of several values of a sampling option, and plots their scores.

The option ema_width is the width of an average of the run's parameters.
"""

import dataclasses
import json

import jax
from absl import logging

from dit_jax.errors import UserError
from dit_jax.evals import plots
from dit_jax.machine import cluster, disk
from dit_jax.runs import averages, evaluate, snapshots


def run(request, paths, name, values, out, command):
    """Judges every run with every value; writes OUT/sweep.json, OUT/sweep.png, and for numbers of
    steps OUT/sampling_compute.png.

    name: a sampling option, or ema_width. OUT/RUN/NAME=VALUE has the receipt and the features of
    each, which are not computed again; OUT/RUN/averages has the averages.
    """
    results = []
    for label, path in zip(labels(paths), paths, strict=True):
        each = dataclasses.replace(request, samples=str(path))
        for value, asked in zip(values, _requests(each, name, values, out / label), strict=True):
            folder = out / label / f"{name}={value}"
            logging.info("%s with %s %s", path, name, value)
            found = evaluate.run(asked, folder, command, kept_in=path)
            results.append({"run": label, "value": value, "receipt": found})
    if jax.process_index() == 0:
        disk.write_text(out / "sweep.json", json.dumps(results, indent=2) + "\n")
        score = next(iter(results[0]["receipt"]["scores"]))  # the Frechet distance
        plots.sweep(out / "sweep.png", results, field=name, score=score)
        if name == "num_steps":  # fig. 10 of the paper
            receipts = [result["receipt"] for result in results]
            plots.sampling_compute(out / "sampling_compute.png", receipts, score=score)
        logging.info("%s", out / "sweep.png")


def _requests(request, name, values, out):
    """The Request of each value."""
    if name != "ema_width":
        options = [request.sampling | {name: value} for value in values]
        return [dataclasses.replace(request, sampling=each) for each in options]
    with cluster.together():
        if jax.process_index() == 0:
            averages.write(request.samples, values, out / snapshots.FOLDER)
    paths = [averages.path_of(out / snapshots.FOLDER, value) for value in values]
    return [dataclasses.replace(request, samples=str(path)) for path in paths]


def labels(paths):
    """A folder name for each run: its own, or with its parent's where two are the same."""
    names = [disk.absolute(path).name for path in paths]
    if len(set(names)) < len(names):
        names = ["-".join(disk.absolute(path).parts[-2:]) for path in paths]
    if len(set(names)) < len(names):
        raise UserError(f"--sweep must be given each run once, got {', '.join(map(str, paths))}")
    return names
