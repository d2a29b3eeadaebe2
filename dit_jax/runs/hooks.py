"""What a run draws while it trains: the curves, samples of its EMA, and its report."""

import jax
from absl import logging

from dit_jax.errors import UserError
from dit_jax.machine import disk
from dit_jax.runs import fields, record, report
from dit_jax.sampling import generate, pictures


def make(settings, parts, fed, workdir, loggers):
    """The hooks of `train.loop.run`, in their order: (every so many steps, hook(step, state)).

    loggers: `loggers.Loggers`, which get the samples too.
    """
    metrics = workdir / "metrics.jsonl"

    def plot_losses(step, state):
        if jax.process_index() == 0:
            with disk.only_warned("the loss curve could not be drawn"):
                record.plot_losses(metrics, workdir / "loss.png")

    def plot_scores(step, state):
        if jax.process_index() == 0:
            with disk.only_warned("the scores could not be drawn"):
                record.plot_scores(metrics, workdir / "scores.png")

    limits = settings.run
    hooks = [(limits.sample_every, plot_losses)]
    if fields.has_images(settings):
        hooks.append((limits.sample_every, _make_samples(settings, parts, fed, workdir, loggers)))
    if limits.score_every:
        hooks.append((limits.score_every, plot_scores))
    return [*hooks, (limits.checkpoint_every, lambda step, state: report.refresh(workdir))]


def _make_samples(settings, parts, fed, workdir, loggers):
    """hook(step, state): draws samples with the same noise and labels always.

    There is a column for each class if there are samples for all.
    """
    count, num_classes, decoder = settings.run.num_samples, parts.model.num_classes, fed.decoder
    labels = [i % num_classes for i in range(count)]
    columns = num_classes if 1 < num_classes <= count else 0

    def draw(step, state):
        try:
            images = generate.run(parts.generate, state.ema, labels, seed=0, batch_size=len(labels))
        except UserError as error:  # on every process
            logging.warning("samples could not be drawn: %s", error)
            return
        images = decoder.decode(images) if decoder else images
        scale = pictures.grid_scale(images.shape[1:3])
        options = {"columns": columns, "scale": scale}
        grid = pictures.grid_of_classes(images, labels, fed.class_names, **options)
        if jax.process_index() == 0:
            path = workdir / "samples" / f"{step:07d}.png"
            with disk.only_warned("samples could not be written"):
                path.parent.mkdir(exist_ok=True)
                with path.open("wb") as file:
                    grid.save(file, format="png")
            loggers.image(step, grid)

    return draw
