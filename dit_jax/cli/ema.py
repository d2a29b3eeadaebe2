"""Makes averages of a run's parameters of any width, after training.

    dit-ema runs/digits --width=0.05,0.1,0.15 --out=runs/averages
    dit-sample runs/averages/0.15 samples.png

RUN was trained with train.ema_snapshot_every. A width is how far the average reaches back: the
standard deviation of its weights over the steps, as a share of the steps so far. OUT/WIDTH is a
checkpoint whose EMA is that average. For each width the command prints the error to be expected,
as a share of the distance between the average and the last parameters; it refuses more than 10 %.
--step takes the averages at an earlier snapshot. dit_jax/train/README.md explains the method.
"""

import sys

from absl import flags

from dit_jax import settings
from dit_jax.cli import command
from dit_jax.errors import UserError
from dit_jax.machine import disk


def define(values):
    options = {"flag_values": values}
    flags.DEFINE_list("width", None, "Widths, each above 0 and below 0.2887.", **options)
    flags.DEFINE_string("out", None, "A folder, for a checkpoint OUT/WIDTH each.", **options)
    flags.DEFINE_integer("step", None, "Of a snapshot; default: the last.", **options)


def check(values, run):
    widths = read_widths(values.width)
    command.output_folder(values.out)
    from dit_jax.runs import snapshots  # needs NumPy

    if disk.absolute(values.out) == disk.absolute(run):
        raise UserError(f"--out must be another folder than the run, got {values.out}")
    snapshots.check(run, widths, values.step)


def read_widths(texts):
    """The widths in a list of texts."""
    try:
        widths = [float(text) for text in texts]
    except ValueError:
        raise UserError(f"width must be numbers, as 0.05,0.1, got {','.join(texts)!r}") from None
    for width in widths:
        settings.check_width("width", width)
    return widths


def main(values, run):
    from dit_jax.runs import averages

    out = command.output_folder(values.out)
    for path, error in averages.write(run, read_widths(values.width), out, values.step):
        print(f"{path}: expected error {error:.2%}")


def entry():
    options = {"required": ["width", "out"], "takes": ("RUN",)}
    sys.exit(command.run("dit-ema", define, main, check=check, **options))


if __name__ == "__main__":
    entry()
