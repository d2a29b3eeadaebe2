"""Our own checkpoints as the converters see them: an architecture, settings, parameters."""

from typing import Any, NamedTuple

import jax
from flax import traverse_util

from dit_jax.checkpoint import steps, store
from dit_jax.errors import UserError
from dit_jax.machine import sharding
from dit_jax.models import dit

TOPICS = ("compute", "diffusion", "data", "sampling")  # of a config: see configs/base.py


class Checkpoint(NamedTuple):
    """params: a nested dict of arrays. settings: the `TOPICS` of a config."""

    model: dit.DiTConfig
    settings: dict[str, Any]
    params: dict[str, Any]


def describe(path):
    """(architecture, settings, step, names of the items) of a checkpoint, no array read."""
    directory, step = steps.locate(path)
    meta = store.read_meta(directory, step, of="model")
    try:
        settings = {topic: dict(meta["config"][topic]) for topic in TOPICS}
        model = dit.DiTConfig.from_json(meta["model"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"checkpoint {directory / str(step)} has a damaged meta: {error}"
        ) from error
    return model, settings, step, sorted(meta["digests"])


def kind(path):
    """ "model" or "vae", what a run or a converted checkpoint is of; None of another directory."""
    try:
        meta = store.read_meta(*steps.locate(path))
    except ValueError:
        return None
    return "vae" if "vae" in meta else "model"


def step_folder(path):
    """The folder of the step that is read of a checkpoint."""
    directory, step = steps.locate(path)
    return directory / str(step)


def read(path, weights="ema"):
    """The Checkpoint of a training run or of a converted checkpoint, its digests checked."""
    if weights not in ("ema", "params"):
        raise UserError(f"weights must be ema or params, got {weights!r}")
    model, settings, step, _ = describe(path)
    directory, _ = steps.locate(path)
    template = jax.eval_shape(lambda: dit.init(model, jax.random.key(0)))
    template = sharding.abstract(template, sharding.of_params(template, sharding.make_mesh()))
    params = store.restore(directory, step, {weights: template})[weights]
    return Checkpoint(model, settings, params)


def write(path, model, settings, params):
    """Writes a converted checkpoint: step 0, its parameters as their own average.

    Takes the arrays out of params one by one, so that a large tree is not in memory twice.
    """
    flat = traverse_util.flatten_dict(params)
    params.clear()
    for name in flat:
        flat[name] = jax.device_put(flat[name])
    meta = {"model": model._asdict(), "config": settings}
    with store.open_writer(background=False) as writer:
        store.save(writer, path, 0, {"ema": traverse_util.unflatten_dict(flat)}, meta)


def settings_of(model, *, space="latents", schedule="linear"):
    """The settings of a DiT of which only the weights are known: the paper's way to sample it."""
    pixels = space == "pixels"
    return {
        "compute": {"dtype": "float32", "attention": "auto", "remat": "none", "unroll": False},
        "diffusion": {"schedule": schedule, "num_steps": 1000},
        "data": {"source": "images", "space": space},
        "sampling": {
            "sampler": "ddpm",
            "num_steps": "250",
            "eta": 0.0,
            "clip_x0": pixels,
            "cfg_scale": 1.5 if model.null_label else 1.0,
            "cfg_channels": 0 if pixels or model.in_channels < 3 else 3,
            "cfg_interval": [0, 999],
        },
    }
