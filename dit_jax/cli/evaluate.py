"""Judges a model's samples and writes the result to a JSON file.

    dit-evaluate runs/digits runs/digits/judgments.json

CHECKPOINT and OUT can also be given as --checkpoint and --out; without OUT it writes that file.
It works for models of digits only so far; dit_jax/evals/digits.py explains the three judgments.
"""

import json
import sys
import time

from absl import flags

import dit_jax
from dit_jax.checkpoint import steps
from dit_jax.cli import command
from dit_jax.errors import UserError
from dit_jax.machine import disk


def define(values):
    options = {"flag_values": values}
    flags.DEFINE_string("checkpoint", None, "A run or a checkpoint.", **options)
    flags.DEFINE_string("out", None, "A JSON file; default: judgments.json in the run.", **options)
    flags.DEFINE_enum("weights", "ema", ["ema", "params"], "EMA or plain parameters.", **options)
    command.define_seed(values)
    flags.DEFINE_integer("batch_size", 500, "Images at a time.", lower_bound=1, **options)


def check(values):
    out = output_path(values)
    if disk.is_on_disk(out):
        command.output_path(out)


def output_path(values):
    directory, _ = steps.locate(values.checkpoint)
    home = directory.parent if directory.name == "checkpoints" else directory
    return disk.path(values.out or home / "judgments.json")


def main(values):
    out = output_path(values)
    from dit_jax.evals import digits
    from dit_jax.machine import devices

    dit = dit_jax.load(values.checkpoint, weights=values.weights)
    data = dit.settings.data
    if data.source != "digits":
        raise UserError(f"checkpoint must be of a model of digits so far, got one of {data.source}")
    if dit.config.num_classes == 1:
        raise UserError(f"checkpoint must be of a model of 2 digits or more, got {data.classes}")
    options = {"seed": values.seed, "batch_size": values.batch_size, "progress": True}
    started = time.perf_counter()
    guided = dit.sample(digits.labels(digits.NUM_GUIDED, data.classes), **options)
    labels = digits.labels(digits.NUM_UNGUIDED, data.classes)
    unguided = dit.sample(labels, cfg_scale=1, **options)
    seconds = time.perf_counter() - started
    judgments = digits.judge(guided, unguided, data.classes)
    print(digits.report(judgments))
    receipt = {
        "checkpoint": values.checkpoint,
        "step": dit.step,
        "weights": values.weights,
        "seed": values.seed,
        "sampling": dit.sampling,
        "samples": {"guided": len(guided), "unguided": len(unguided)},
        "seconds_to_sample": seconds,
        "devices": devices.describe(),
        "judgments": judgments,
    }
    disk.write_text(out, json.dumps(receipt, indent=2) + "\n")


def entry():
    options = {"required": ["checkpoint"], "words": ["checkpoint", "out"]}
    sys.exit(command.run("dit-evaluate", define, main, check=check, **options))


if __name__ == "__main__":
    entry()
