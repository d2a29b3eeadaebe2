"""Loggers of a run beside metrics.jsonl: TensorBoard and Weights & Biases, by `run.loggers`.

They get the numbers of metrics.jsonl, the grids of samples and the settings. metrics.jsonl stays
the record of the run: a logger that was added later, or that lost its last lines with a killed
run, gets them from there. A resumed run gives no step twice. A logger that fails while a run
trains is only warned of.

A logger is a class with `first`, the first step that it lacks, scalars(step, values),
image(step, picture) and close(). To add one, write it here, and name it in `LOGGERS`, in PACKAGES,
in `settings.LOGGERS` and, with its packages, in setup.py.
"""

import contextlib
import importlib.util
import json
import os
import secrets

from absl import logging

from dit_jax import settings as settings_lib
from dit_jax.errors import UserError
from dit_jax.machine import disk


class TensorBoard:
    """Writes event files into the folder tensorboard of a workdir, without TensorFlow."""

    def __init__(self, workdir, settings, start):
        from tensorboardX import SummaryWriter

        folder = workdir / "tensorboard"
        # TensorBoard then hides what a killed run wrote of this step and later ones.
        self.first = start if disk.exists(folder) else 0
        options = {"flush_secs": 1, "filename_suffix": f".{start:07d}"}
        self._writer = SummaryWriter(str(folder), purge_step=self.first, **options)
        text = json.dumps(settings_lib.to_json(settings), indent=2)
        self._writer.add_text("config", f"```json\n{text}\n```", self.first)

    def scalars(self, step, values):
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def image(self, step, picture):
        import numpy as np

        self._writer.add_image(
            "samples", np.asarray(picture.convert("RGB")), step, dataformats="HWC"
        )

    def close(self):
        self._writer.close()


class WeightsAndBiases:
    """Logs to Weights & Biases, or into the folder wandb of a workdir if WANDB_MODE is offline.

    wandb.json in the workdir holds the id of its run and the last step that it surely has. Weights
    & Biases takes no step twice, so what a resumed run repeats is left out.
    """

    def __init__(self, workdir, settings, start):
        import wandb

        self._wandb, self._path = wandb, workdir / "wandb.json"
        state = disk.read_json(self._path) if start else {}  # what starts at 0 is another run
        self._id, self._kept = state.get("id") or secrets.token_hex(4), state.get("step", -1)
        self._open = None  # the step whose values may still be in memory
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "dit_jax"),
                name=workdir.name,
                id=self._id,
                resume="allow",
                dir=str(workdir) if disk.is_on_disk(workdir) else None,
                config=settings_lib.to_json(settings),
                settings=wandb.Settings(console="off", silent=True),
            )
        except wandb.Error as error:
            raise UserError(
                f"run.loggers must be able to start, got 'wandb': {_one_line(error)}; "
                "WANDB_MODE=offline needs neither an account nor a network"
            ) from error
        self._keep(self._kept)

    @property
    def first(self):
        return self._kept + 1

    def scalars(self, step, values):
        if step > self._kept:
            self._log(step, values)

    def image(self, step, picture):
        if step > self._kept:
            self._log(step, {"samples": self._wandb.Image(picture)})

    def _log(self, step, values):
        self._run.log(values, step=step)
        if self._open is not None and step > self._open:
            self._keep(self._open)
        self._open = step

    def _keep(self, step):
        self._kept = step
        disk.write_text(self._path, json.dumps({"id": self._id, "step": step}) + "\n")

    def close(self):
        self._run.finish()
        if self._open is not None:
            self._keep(self._open)


LOGGERS = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}
PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}


def check(names, workdir):
    """UserError unless the package of each of these loggers is installed, for a run in workdir."""
    if "tensorboard" in names and not disk.is_on_disk(workdir):
        raise UserError(f"run.loggers must be without tensorboard in a bucket, got {workdir}")
    for name in names:
        if importlib.util.find_spec(PACKAGES[name]) is None:
            raise UserError(
                f"run.loggers must be installed, got {name!r}: pip install dit_jax[{name}]"
            )


class Loggers:
    """The loggers of a run, none but on process 0; as a context, it closes them at its end."""

    def __init__(self, opened=()):
        self._opened = opened

    def scalars(self, line):
        """Logs a line of metrics.jsonl."""
        numbers = {k: v for k, v in line.items() if k != "step" and isinstance(v, (int, float))}
        for each in self._opened:
            with _only_warned(each):
                each.scalars(line["step"], numbers)

    def image(self, step, picture):
        """Logs a grid of samples, a PIL image."""
        for each in self._opened:
            with _only_warned(each):
                each.image(step, picture)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for each in self._opened:
            with _only_warned(each):
                each.close()


@contextlib.contextmanager
def _only_warned(logger):
    """A context that logs any exception as a warning: no logger is worth a run."""
    try:
        yield
    except Exception as error:
        name = type(logger).__name__
        logging.warning("%s could not be written: %s", name, _one_line(error))


def open_all(settings, workdir, start, lines):
    """The Loggers of a run that goes on from step `start`; lines: what metrics.jsonl has so far."""
    check(settings.run.loggers, workdir)
    opened = []
    for name in dict.fromkeys(settings.run.loggers):  # each once
        logger = LOGGERS[name](workdir, settings, start)
        _catch_up(Loggers([logger]), logger.first, lines, workdir / "samples")
        opened.append(logger)
    return Loggers(opened)


def _catch_up(logger, first, lines, samples):
    """Logs the lines from a step on, and the samples of their steps."""
    from PIL import Image

    for line in lines:
        if line["step"] >= first:
            logger.scalars(line)
            path = samples / f"{line['step']:07d}.png"
            if disk.exists(path):
                with path.open("rb") as file:
                    logger.image(line["step"], Image.open(file))


def _one_line(error):
    return " ".join(str(error).split())
