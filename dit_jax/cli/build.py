"""From a ConfigDict to the parts of a run; nothing below reads a config.

Every function checks what it reads: a value that does not fit is a ValueError with its field.
"""

import json

import jax

from dit_jax import devices, generate
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


def model(config):
    """The DiTConfig and its apply(params, x, t, y)."""
    model_config = dit.configure(**config.model)
    compute = config.compute.to_dict()
    compute["attention"] = devices.resolve_attention(compute["attention"], compute["dtype"])
    return model_config, dit.make_apply(model_config, **compute)


def schedule(config):
    return schedules.make(**config.diffusion)


def optimizer(config):
    train = config.train
    names = ("learning_rate", "b1", "b2", "eps", "weight_decay", "warmup_steps", "decay_steps")
    return optimizers.adamw(**{name: train[name] for name in names})


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


def train_step(config, apply, schedule, optimizer):
    """The step of the config: see `train.step.make_train_step`."""
    train = config.train
    return steps.make_train_step(
        apply,
        schedule,
        optimizer,
        null_label=config.model.num_classes,
        class_dropout_prob=train.class_dropout_prob,
        ema_decay=train.ema_decay,
        ema_warmup=train.ema_warmup,
        accumulation_steps=train.accumulation_steps,
    )


def sampler(config, apply, model_config, schedule, mesh):
    """The sampler of the config: see `generate.make_sampler`."""
    return generate.make_sampler(
        apply, model_config, schedule, mesh, space=config.data.space, **config.sampling
    )


def to_json(config):
    """The config as plain JSON values."""
    return json.loads(json.dumps(config.to_dict()))
