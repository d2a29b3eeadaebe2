"""The runs below a folder, one a line (`dit-runs`)."""

from dit_jax.errors import UserError
from dit_jax.machine import disk, words
from dit_jax.runs import summary

DEPTH = 3  # folders below the given one
HEADER = ("run", "model", "data", "step", "loss", "state", "size", "best score")
RIGHT = ("step", "loss", "size")


def describe(folder):
    """The table of the runs in or below a folder, as text; UserError if there is none."""
    folder = disk.path(folder)
    paths = list(find(folder))
    if not paths:
        raise UserError(f"DIR must have runs of dit-train in or below it, got {folder}")
    rows = [HEADER, *(_row(path, _name(path, folder)) for path in paths)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(_line(row, widths) for row in rows)


def find(folder, depth=DEPTH):
    """The workdirs in and below a folder, by name. A run's own folders are not searched."""
    if summary.is_run(folder):
        yield folder
    elif depth:
        for path in disk.children(folder):
            if not disk.is_clutter(path.name) and path.is_dir():
                yield from find(path, depth - 1)


def _name(path, folder):
    return str(path.relative_to(folder)) if path != folder else disk.absolute(path).name


def _row(path, name):
    run = summary.read(path)
    total = f"/{run.settings.run.total_steps:,}" if run.settings else ""
    state = f"{run.state}; damaged: {run.problems[0]}" if run.problems else run.state
    return (
        *(name, run.model, run.data, f"{run.step:,}{total}"),
        *("-" if run.loss is None else f"{run.loss:.4f}", state),
        *(words.size(disk.total_size(path)), str(run.best or "-")),
    )


def _line(row, widths):
    cells = (
        text.rjust(width) if name in RIGHT else text.ljust(width)
        for name, text, width in zip(HEADER, row, widths, strict=True)
    )
    return "  ".join(cells).rstrip()
