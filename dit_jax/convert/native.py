"""Reads and writes dit_jax checkpoints for the converters, and makes all settings.

A checkpoint has three parts here: a DiTConfig, Settings, of which `TOPICS` matter, and parameters.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
from flax import traverse_util

from dit_jax import settings as settings_lib
from dit_jax.checkpoint import peek, steps, store
from dit_jax.convert import files
from dit_jax.diffusion import fields
from dit_jax.errors import UserError
from dit_jax.machine import prng, sharding
from dit_jax.models import dit

TOPICS = ("compute", "diffusion", "data", "sampling")  # topics of a config: see configs/base.py


class Checkpoint(NamedTuple):
    """A DiTConfig, its Settings, and its parameters (a nested dict of arrays)."""

    model: dit.DiTConfig
    settings: settings_lib.Settings
    params: dict[str, Any]


def read_meta(path):
    """Returns the meta of the step that `read` reads."""
    directory, step = steps.locate(path)
    return store.read_meta(directory, step, of="model")


def describe(path):
    """Returns (DiTConfig, Settings, step, item names) of a checkpoint. Reads no array."""
    directory, step = steps.locate(path)
    meta = read_meta(path)
    try:
        settings = settings_lib.read({topic: meta["config"][topic] for topic in TOPICS})
        model = dit.DiTConfig.from_json(meta["model"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"checkpoint {directory / str(step)} has a damaged meta: {error}"
        ) from error
    return model, settings, step, sorted(meta["digests"])


def kind(path):
    """Returns the key of `peek.KINDS` that a checkpoint has, None for anything else."""
    try:
        meta = store.read_meta(*steps.locate(path))
    except ValueError:
        return None
    return next((kind for kind in peek.KINDS if kind in meta), None)


def step_folder(path):
    """Returns the folder of the step that `read` reads."""
    directory, step = steps.locate(path)
    return directory / str(step)


def read(path, weights="ema"):
    """Reads a training run or a converted checkpoint, and checks its digests."""
    files.check_weights(weights)
    model, settings, step, _ = describe(path)
    directory, _ = steps.locate(path)
    params = store.restore_params(
        directory,
        step,
        lambda: dit.init(model, prng.key(0)),
        weights=weights,
        mesh=sharding.make_mesh(),
    )
    return Checkpoint(model, settings, params)


def write(path, model, settings, params, **meta):
    """Writes a converted checkpoint: one step, 0, that contains only `params`, saved as the EMA.

    Empties `params` array by array, so that a large tree is not in memory twice. meta: more that
    the checkpoint remembers, such as class_names.
    """
    flat = traverse_util.flatten_dict(params)
    params.clear()
    for name in flat:
        flat[name] = jax.device_put(flat[name])
    config = {topic: settings_lib.to_json(getattr(settings, topic)) for topic in TOPICS}
    meta |= {"model": model.to_json(), "config": config}
    with store.open_writer(background=False) as writer:
        store.save(writer, path, 0, {"ema": traverse_util.unflatten_dict(flat)}, meta)


def settings_of(model, *, space="latents", diffusion=None):
    """Returns Settings for weights without a config: the sampling of the paper, or of SiT's.

    diffusion: None for the paper's.
    """
    diffusion = diffusion or settings_lib.Diffusion()
    pixels, is_path = space == "pixels", fields.is_path(diffusion)
    num_steps = 250 if is_path else min(250, diffusion.num_steps)
    return settings_lib.Settings(
        compute=settings_lib.Compute(dtype="float32"),
        diffusion=diffusion,
        data=settings_lib.Data(source="images", space=space),
        sampling=settings_lib.Sampling(
            sampler="euler" if is_path else "ddpm",
            num_steps=str(num_steps),
            clip_x0=pixels,
            cfg_scale=1.5 if model.null_label else 1.0,
            cfg_channels=0 if pixels or model.in_channels < 3 else 3,
            cfg_interval=(0, fields.last_time(diffusion)),
        ),
    )


def check_prediction(settings, target):
    """UserError for a model that `target` would sample as DDPM's that predicts the noise."""
    diffusion = settings.diffusion
    if (diffusion.process, diffusion.prediction) != ("ddpm", "noise"):
        raise UserError(
            f"process must be ddpm and predict noise for {target}, "
            f"got {diffusion.prediction} on {diffusion.process}"
        )


def settings_of_bundle(model, *, space, diffusion, sampling, data):
    """Returns the Settings of a bundle from the topics in its config.json."""
    return dataclasses.replace(
        settings_of(model, space=space),
        diffusion=settings_lib.read_topic(settings_lib.Diffusion, diffusion),
        data=settings_lib.read_topic(settings_lib.Data, data | {"space": space}),
        sampling=settings_lib.read_topic(settings_lib.Sampling, sampling),
    )
