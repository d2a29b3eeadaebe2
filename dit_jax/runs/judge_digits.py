"""Judges a model of digits as in the README's tables, into a JSON file."""

import json
import time

from dit_jax.checkpoint import steps, store
from dit_jax.errors import UserError
from dit_jax.evals import digits
from dit_jax.machine import devices, disk
from dit_jax.sampling import trained


def fits(request):
    """Whether a Request asks for this: a model of digits, and nothing that is not said here."""
    if not request.is_plain:
        return False
    try:
        directory, step = steps.locate(request.samples)
    except UserError:
        return False
    data = store.read_meta(directory, step, of="model")["config"]["data"]
    return data.get("source") == "digits"


def run(request, out, batch_size):
    """Draws samples, prints the judgments of `evals.digits` and writes them to the file `out`."""
    dit = trained.load(request.samples, weights=request.weights)
    classes = dit.settings.data.classes
    if dit.config.num_classes == 1:
        raise UserError(f"checkpoint must be of a model of 2 digits or more, got {classes}")
    options = {"seed": request.seed, "batch_size": batch_size, "progress": True}
    started = time.perf_counter()
    guided = dit.sample(digits.labels(digits.NUM_GUIDED, classes), **options)
    unguided = dit.sample(digits.labels(digits.NUM_UNGUIDED, classes), cfg_scale=1, **options)
    seconds = time.perf_counter() - started
    judgments = digits.judge(guided, unguided, classes)
    print(digits.report(judgments))
    receipt = {
        "checkpoint": request.samples,
        "step": dit.step,
        "weights": request.weights,
        "digest": dit.digest,
        "seed": request.seed,
        "sampling": dit.sampling,
        "samples": {"guided": len(guided), "unguided": len(unguided)},
        "seconds_to_sample": seconds,
        "devices": devices.describe(),
        "judgments": judgments,
    }
    disk.write_text(out, json.dumps(receipt, indent=2) + "\n")
