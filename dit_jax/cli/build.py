"""From a ConfigDict to the parts of a run; nothing below reads a config.

A value that does not fit is a ValueError that names its field.
"""

import json
from collections.abc import Callable
from typing import NamedTuple

import jax
import optax

from dit_jax import devices, generate, sharding
from dit_jax.data import digits, synthetic
from dit_jax.diffusion import schedules
from dit_jax.models import dit
from dit_jax.train import optimizer as optimizers
from dit_jax.train import step as steps


def check(config):
    """ValueError where a number of the config is out of its range."""
    at_least_one = {
        "train": ("batch_size", "accumulation_steps"),
        "run": (
            *("total_steps", "log_every", "checkpoint_every"),
            *("keep_checkpoints", "sample_every", "num_samples"),
        ),
    }
    for topic, names in at_least_one.items():
        for name in names:
            if config[topic][name] < 1:
                raise ValueError(f"{topic}.{name} must be at least 1, got {config[topic][name]}")
    train = config.train
    parts = jax.device_count() * train.accumulation_steps
    if train.batch_size % parts:
        raise ValueError(
            f"train.batch_size must be divisible by {jax.device_count()} devices x "
            f"{train.accumulation_steps} accumulation_steps, got {train.batch_size}"
        )
    for name in ("class_dropout_prob", "ema_decay", "b1", "b2"):
        if not 0 <= train[name] < 1:
            raise ValueError(f"train.{name} must be in [0, 1), got {train[name]}")
    if train.class_dropout_prob and not config.model.null_label:
        raise ValueError(
            "train.class_dropout_prob must be 0 without model.null_label, "
            f"got {train.class_dropout_prob}"
        )
    for name in ("warmup_steps", "decay_steps", "weight_decay"):
        if train[name] < 0:
            raise ValueError(f"train.{name} must be 0 or more, got {train[name]}")
    if train.learning_rate <= 0:
        raise ValueError(f"train.learning_rate must be above 0, got {train.learning_rate}")


class Parts(NamedTuple):
    """What a config says, made: everything of a run but its data and its state."""

    model: dit.DiTConfig
    apply: Callable  # (params, x, t, y)
    schedule: schedules.Schedule
    optimizer: optax.GradientTransformation
    train_step: Callable  # (state, batch, key) -> state, metrics
    draw: Callable  # (params, labels, keys) -> images
    mesh: jax.sharding.Mesh

    def init(self, key):
        """Random parameters."""
        return dit.init(self.model, key)


def parts(config):
    """The Parts of a config, all its values checked."""
    check(config)
    model = dit.configure(**config.model)
    compute = config.compute.to_dict()
    compute["attention"] = devices.resolve_attention(compute["attention"], compute["dtype"])
    apply = dit.make_apply(model, **compute)
    schedule = schedules.make(**config.diffusion)
    train, mesh = config.train, sharding.make_mesh()
    names = ("learning_rate", "b1", "b2", "eps", "weight_decay", "warmup_steps", "decay_steps")
    optimizer = optimizers.adamw(**{name: train[name] for name in names})
    train_step = steps.make_train_step(
        apply,
        schedule,
        optimizer,
        null_label=model.num_classes,
        class_dropout_prob=train.class_dropout_prob,
        ema_decay=train.ema_decay,
        ema_warmup=train.ema_warmup,
        accumulation_steps=train.accumulation_steps,
    )
    draw = generate.make_sampler(
        apply, model, schedule, mesh, space=config.data.space, **config.sampling
    )
    return Parts(model, apply, schedule, optimizer, train_step, draw, mesh)


def source(config):
    """The random-access source of training examples."""
    kind, model = config.data.source, config.model
    shape = (*model.input_size, model.in_channels)
    if kind == "digits":
        train, _ = digits.load()
        for name, value, rule in (
            ("model.input_size and in_channels", shape, train.image.shape[1:]),
            ("model.num_classes", model.num_classes, digits.NUM_CLASSES),
            ("data.space", config.data.space, "pixels"),
        ):
            if value != rule:
                raise ValueError(f"{name} must be {rule} for digits, got {value}")
        return train
    if kind == "synthetic":
        return synthetic.Synthetic(shape, model.num_classes)
    if kind == "imagenet":
        raise ValueError(
            "data.source 'imagenet' is not there yet: "
            "train on random latents with --config.data.source=synthetic"
        )
    raise ValueError(f"data.source must be one of digits, imagenet, synthetic, got {kind!r}")


def to_json(config):
    """The config as plain JSON values."""
    return json.loads(json.dumps(config.to_dict()))
