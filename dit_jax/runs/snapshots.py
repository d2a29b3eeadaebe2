"""Which snapshots of its averages a run has, and which widths they can give: without jax."""

from typing import NamedTuple

from dit_jax.checkpoint import peek, steps
from dit_jax.errors import UserError
from dit_jax.machine import disk
from dit_jax.train import power_ema

FOLDER = "averages"  # of a run: averages/STEP/ holds the averages of that step


class Found(NamedTuple):
    """The snapshots of a run: their directory, their steps, and the widths that each has."""

    directory: object
    steps: list
    widths: tuple

    def reconstruct(self, step, width):
        """{(step, index of a width): its coefficient}, and the expected error: `power_ema`."""
        keys = [(each, i) for each in self.steps for i in range(len(self.widths))]
        known = [power_ema.Snapshot(each, self.widths[i]) for each, i in keys]
        coefficients, error = power_ema.reconstruct(known, step, width)
        return dict(zip(keys, map(float, coefficients), strict=True)), error


def find(path, read=None):
    """The Found of a run; UserError if it has none.

    read(directory, step) -> meta; None: `peek.read`, which cannot read a bucket: then the widths
    are ().
    """
    directory = disk.path(path) / FOLDER
    saved = steps.saved(directory)
    if not saved:
        raise UserError(
            "RUN must be a run with snapshots of its averages, which train.ema_snapshot_every "
            f"saves, got {path}"
        )
    meta = read(directory, saved[-1]) if read else peek.read(directory / str(saved[-1]))
    return Found(directory, saved, tuple(meta.get("ema_widths", ())))


def check(path, widths, step=None):
    """UserError if a run cannot give averages of these widths at a step; None: at the last."""
    if len({f"{width:g}" for width in widths}) < len(widths):
        raise UserError(f"width must be given once each, got {', '.join(map(str, widths))}")
    found = find(path)
    if found.widths:
        for width in widths:
            found.reconstruct(found.steps[-1] if step is None else step, width)
