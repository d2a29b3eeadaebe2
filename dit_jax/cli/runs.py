"""Lists the runs in a folder and below: config, step, last loss, state, size, best score.

    dit-runs
    dit-runs runs

DIR is the current folder if it is not given. The loss is smoothed over a tenth of the run. The best
score is that of the run's receipts, else of its record. The command only reads.
"""

import sys

from dit_jax.cli import command
from dit_jax.errors import UserError
from dit_jax.machine import disk


def define(values):
    """Defines no flags."""


def check(values, *folders):
    if len(folders) > 1:
        raise UserError(f"takes [DIR], got {' '.join(folders)!r}")
    for folder in folders:
        if not disk.exists(disk.path(folder)):
            raise UserError(f"DIR must exist, got {folder}")


def main(values, folder="."):
    from dit_jax.runs import overview

    print(overview.describe(folder))


def entry():
    sys.exit(command.run("dit-runs", define, main, check=check, takes=None, uses_jax=False))


if __name__ == "__main__":
    entry()
