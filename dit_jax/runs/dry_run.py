"""What a run would do, without training: `dit-train --dry_run`. Writes nothing into the workdir."""

import collections

import jax
import numpy as np

from dit_jax import settings as settings_lib
from dit_jax.checkpoint import steps
from dit_jax.machine import devices, prng, sharding, words
from dit_jax.models import flops, pixels
from dit_jax.runs import origin as origins
from dit_jax.runs import outline, run
from dit_jax.sampling import imagenet, pictures
from dit_jax.train import step as train_steps

NUM_SHOWN = 64  # examples in the picture
NUM_CLASSES = 5  # named in a line


def describe(settings, workdir, init_from=None, picture_path=None):
    """Yields lines of text: settings, model, work, first batch, memory of the compiled step.

    picture_path: a PNG of the first examples of the batch; None: none is drawn. UserError as of
    `run.run`, also for a step that does not fit into the memory.
    """
    parts, origin = run.prepare(settings, workdir, init_from)
    fed = run.open_data(settings, parts, workdir)
    for name, value in settings_lib.flat(settings).items():
        yield f"{name} = {value}"
    step, total_steps = steps.latest(workdir / "checkpoints"), settings.run.total_steps
    if step and step >= total_steps:
        yield run.explain_end(settings, workdir, step)
    elif step:
        yield f"resumes from step {step}"
    elif origin:
        yield f"starts from step {origin['step']} of {origin['path']} ({origin['weights']}):"
        lines = origins.describe(origin, settings, parts.model, fed.class_names)
        yield from (f"  {line}" for line in lines)
    state = parts.abstract_state()
    yield from outline.describe(settings, parts, state.params, len(fed.source))
    work = total_steps * settings.train.batch_size * parts.train_flops
    yield (
        f"FLOPs: {flops.forward_flops(parts.model) / 1e9:.4g} G for a forward pass of an example, "
        f"{work:.3g} for {total_steps:,} steps"
    )
    yield from (
        f"warning: {line}" for line in outline.warnings(settings, parts.model, len(fed.source))
    )
    batch = next(run.make_batches(settings, parts, fed, 0))
    x0 = jax.jit(train_steps.to_x0)(batch, prng.key(settings.seed))
    yield from _describe_batch(sharding.to_host(x0), sharding.to_host(batch["label"]), fed)
    if picture_path:
        _draw(settings, batch, x0, fed, picture_path)
        yield f"picture of the first batch: {picture_path}"
    with devices.explained_memory():
        compiled = parts.jit_step().lower(state, batch, prng.key(0)).compile()
    yield _describe_memory(compiled)
    devices.check_memory(compiled)


def _describe_batch(x0, labels, fed):
    """What is in a batch: x0 (N, ..., C) in model units, labels (N,)."""
    yield (
        f"first batch: x0 {x0.shape} in model units: mean {x0.mean():.3f}, standard deviation "
        f"{x0.std():.3f}, from {x0.min():.3f} to {x0.max():.3f}"
    )
    if not np.isfinite(x0).all():
        yield f"warning: {np.sum(~np.isfinite(x0))} numbers of the first batch are not finite"
    counts = collections.Counter(labels.tolist())
    names = imagenet.named(fed.class_names)
    most = [
        f"{names[label] if names else label} ({count})"
        for label, count in counts.most_common(NUM_CLASSES)
    ]
    more = ", ..." if len(counts) > NUM_CLASSES else ""
    yield f"first batch: {len(counts)} classes: {', '.join(most)}{more}"


def _describe_memory(compiled):
    needed = devices.needed_memory(compiled)
    if needed is None:
        return "memory: unknown to this compiler"
    parts = ", ".join(f"{words.size(size)} of {name}" for name, size in needed.items())
    total, limit = words.size(sum(needed.values())), words.size(devices.memory_limit())
    return f"memory of each of {devices.describe()}: {total} of {limit}: {parts}"


def _draw(settings, batch, x0, fed, path):
    """Writes the first examples of a batch as a grid with their classes."""
    if fed.decoder:
        images = fed.decoder.decode(sharding.to_host(x0)[:NUM_SHOWN])
    else:
        images = sharding.to_host(pixels.to_uint8(x0))[:NUM_SHOWN]
    labels = sharding.to_host(batch["label"])[:NUM_SHOWN].tolist()
    scale = pictures.grid_scale(images.shape[1:3])
    picture = pictures.grid_of_classes(images, labels, fed.class_names, scale=scale)
    if jax.process_index() == 0:
        picture.save(path)
