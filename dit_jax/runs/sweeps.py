"""Judges runs with each of several values of a sampling option, and plots their scores."""

import dataclasses
import json

import jax
from absl import logging

from dit_jax.errors import UserError
from dit_jax.evals import plots
from dit_jax.machine import disk
from dit_jax.runs import evaluate


def run(request, paths, name, values, out, command):
    """Judges every run with every value; writes OUT/sweep.json, OUT/sweep.png, and for numbers of
    steps OUT/sampling_compute.png.

    name: a sampling option. OUT/RUN/NAME=VALUE has the receipt and the features of each, which are
    not computed again.
    """
    results = []
    for label, path in zip(labels(paths), paths, strict=True):
        for value in values:
            options = request.sampling | {name: value}
            each = dataclasses.replace(request, samples=str(path), sampling=options)
            folder = out / label / f"{name}={value}"
            logging.info("%s with %s %s", path, name, value)
            found = evaluate.run(each, folder, command)
            results.append({"run": label, "value": value, "receipt": found})
    if jax.process_index() == 0:
        disk.write_text(out / "sweep.json", json.dumps(results, indent=2) + "\n")
        score = next(iter(results[0]["receipt"]["scores"]))  # the Frechet distance
        plots.sweep(out / "sweep.png", results, field=name, score=score)
        if name == "num_steps":  # fig. 10 of the paper
            receipts = [result["receipt"] for result in results]
            plots.sampling_compute(out / "sampling_compute.png", receipts, score=score)
        logging.info("%s", out / "sweep.png")


def labels(paths):
    """A folder name for each run: its own, or with its parent's where two are the same."""
    names = [disk.absolute(path).name for path in paths]
    if len(set(names)) < len(names):
        names = ["-".join(disk.absolute(path).parts[-2:]) for path in paths]
    if len(set(names)) < len(names):
        raise UserError(f"--sweep must be given each run once, got {', '.join(map(str, paths))}")
    return names
