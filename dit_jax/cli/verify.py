"""Reads everything that was saved in a directory and reports damage.

    dit-verify runs/xl2

PATH is a training run, its checkpoints, one step, a converted checkpoint, the output of dit-prepare
or dit-encode, or what dit-convert wrote for PyTorch: a bundle, a pipeline or a weights file with
its report. The command compares every array with its digest, every file with its sha256, and
config.json with the newest step; it reads metrics.jsonl and names what is missing. It writes
nothing. Exit code 0: no damage; 1: something is damaged, and named; 2: there is nothing to check.
"""

import sys

from dit_jax.cli import command
from dit_jax.errors import UserError
from dit_jax.machine import disk
from dit_jax.runs import verifiable


def define(values):
    """Defines no flags."""


def check(values, path):
    if not disk.exists(disk.path(path)):
        raise UserError(f"PATH must exist, got {path}")
    verifiable.check(disk.path(path))


def main(values, path):
    path = disk.path(path)
    from dit_jax.runs import verify

    return 1 if verify.run(path) else 0


def entry():
    sys.exit(command.run("dit-verify", define, main, check=check, takes=("PATH",)))


if __name__ == "__main__":
    entry()
