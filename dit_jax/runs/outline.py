"""What a run will do, logged before its first step."""

import math

import jax
from absl import logging

from dit_jax.machine import devices, words


def log(settings, parts, params, num_examples):
    """Logs the devices, the model, the work of a step and the data, and warns of odd sizes."""
    for line in describe(settings, parts, params, num_examples):
        logging.info("%s", line)
    if jax.process_index() == 0:
        for line in warnings(settings, parts.model, num_examples):
            logging.warning("%s", line)


def describe(settings, parts, params, num_examples):
    """The lines of text about a run with these parameters, arrays or their shapes."""
    model, batch_size = parts.model, settings.train.batch_size
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    mesh = ", ".join(f"{name} {size}" for name, size in parts.mesh.shape.items())
    name = settings.model.name
    work = batch_size * parts.train_flops
    total_steps = settings.run.total_steps
    lines = [
        f"devices: {devices.describe()}; mesh: {mesh}",
        f"model: {name}, {count:,} parameters, {model.num_tokens} tokens",
        f"step: {batch_size} examples, {work / 1e12:.4g} TFLOP",
        f"data: {num_examples:,} examples, {num_examples / batch_size:,.1f} batches per epoch, "
        f"{total_steps * batch_size / num_examples:,.1f} epochs in {total_steps:,} steps",
    ]
    if widths := settings.train.averages:
        every, size = settings.train.ema_snapshot_every, 4 * count * len(widths)  # float32
        on_disk = words.size(math.ceil(total_steps / every) * size)
        lines.append(
            f"averages: widths {', '.join(f'{width:g}' for width in widths)}, "
            f"{words.size(size)} of memory; a snapshot every {every:,} steps, {on_disk} on disk"
        )
    return lines


def warnings(settings, model, num_examples):
    """What is allowed and probably not meant, as lines of text."""
    lines, batch_size = [], settings.train.batch_size
    if batch_size > num_examples:
        lines.append(
            f"train.batch_size is {batch_size}, but there are {num_examples} examples: a batch "
            "repeats examples"
        )
    warmup_steps, total_steps = settings.train.warmup_steps, settings.run.total_steps
    if warmup_steps and warmup_steps >= total_steps:
        lines.append(
            f"train.warmup_steps is {warmup_steps}, but run.total_steps is {total_steps}: the "
            "learning rate never reaches train.learning_rate"
        )
    if (every := settings.train.ema_snapshot_every) > total_steps:
        lines.append(
            f"train.ema_snapshot_every is {every}, but run.total_steps is {total_steps}: one "
            "snapshot gives few widths"
        )
    numbers = model.patch_area * model.in_channels
    if numbers > model.hidden_size:
        lines.append(
            f"a patch has {numbers} numbers, but model.size {settings.model.size} has only "
            f"{model.hidden_size} per token and cannot keep them all: take a smaller "
            "model.patch_size or a larger model.size"
        )
    return lines
