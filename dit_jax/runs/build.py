"""From a ConfigDict to the parts of a run; nothing below reads a config.

A value that does not fit is a UserError that names its field.
"""

import json
import math
import operator
from collections.abc import Callable
from typing import NamedTuple

import jax
import optax

from dit_jax.diffusion import schedules
from dit_jax.errors import UserError
from dit_jax.machine import devices as machine
from dit_jax.machine import sharding
from dit_jax.models import dit
from dit_jax.sampling import generate
from dit_jax.train import optimizer as optimizers
from dit_jax.train import state as states
from dit_jax.train import step as steps

RULES = {  # of the numbers of a config
    "in 0 .. 4294967295": (lambda x: 0 <= x < 2**32, ["seed"]),
    "at least 1": (
        lambda x: x >= 1,
        [
            *("train.batch_size", "train.accumulation_steps", "run.total_steps", "run.log_every"),
            *("run.checkpoint_every", "run.keep_checkpoints"),
            *("run.sample_every", "run.num_samples"),
        ],
    ),
    "0 or more": (
        lambda x: x >= 0,
        [
            *("train.warmup_steps", "train.decay_steps", "train.weight_decay"),
            *("run.keep_best", "run.max_rollbacks"),
        ],
    ),
    "0 or above 1": (lambda x: x == 0 or x > 1, ["run.spike_factor"]),
    "above 0": (lambda x: x > 0, ["train.learning_rate", "train.eps"]),
    "in [0, 1)": (
        lambda x: 0 <= x < 1,
        ["train.class_dropout_prob", "train.ema_decay", "train.b1", "train.b2"],
    ),
}


def check(config):
    """UserError where a number of the config is out of its range."""
    for path, value in jax.tree_util.tree_leaves_with_path(config.to_dict()):
        if isinstance(value, float) and not math.isfinite(value):
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            raise UserError(f"{name} must be finite, got {value}")
    for rule, (fits, names) in RULES.items():
        for name in names:
            value = operator.attrgetter(name)(config)
            if not fits(value):
                raise UserError(f"{name} must be {rule}, got {value}")
    train = config.train
    if train.class_dropout_prob and not config.model.null_label:
        raise UserError(
            "train.class_dropout_prob must be 0 without model.null_label, "
            f"got {train.class_dropout_prob}"
        )


def check_mesh(config, mesh):
    """UserError where the batch or the heads cannot be divided as the mesh does."""
    train, shards = config.train, sharding.batch_shards(mesh)
    if train.batch_size % (shards * train.accumulation_steps):
        raise UserError(
            f"train.batch_size must be divisible by {shards} (mesh.data x mesh.fsdp) x "
            f"{train.accumulation_steps} accumulation_steps, got {train.batch_size}"
        )
    heads, tensor = dit.SIZES[config.model.size][2], mesh.shape["tensor"]
    if heads % tensor:
        raise UserError(
            f"mesh.tensor must divide the {heads} heads of {config.model.size}, got {tensor}"
        )


class Parts(NamedTuple):
    """What a config says, made: everything of a run but its data and its state."""

    model: dit.DiTConfig
    apply: Callable  # (params, x, t, y)
    schedule: schedules.Schedule
    optimizer: optax.GradientTransformation
    train_step: Callable  # (state, batch, key) -> state, metrics
    draw: Callable  # (params, labels, keys) -> images
    mesh: jax.sharding.Mesh
    shard_optimizer: bool

    def init(self, key):
        """Random parameters."""
        return dit.init(self.model, key)

    def create_state(self, key):
        return states.create(
            self.init, self.optimizer, key, self.mesh, shard_optimizer=self.shard_optimizer
        )

    def abstract_state(self):
        return states.abstract(
            self.init,
            self.optimizer,
            jax.random.key(0),
            self.mesh,
            shard_optimizer=self.shard_optimizer,
        )

    def jit_step(self):
        """The training step, which keeps the state where it is."""
        places = states.shardings(self.abstract_state())
        everywhere = sharding.replicated(self.mesh)
        return jax.jit(self.train_step, donate_argnums=0, out_shardings=(places, everywhere))


def parts(config, devices=None):
    """The Parts of a config, all its values checked, on all devices or those given."""
    check(config)
    model = dit.configure(**config.model)
    sizes = config.mesh.to_dict()
    shard_optimizer = sizes.pop("shard_optimizer")
    mesh = sharding.make_mesh(**sizes, devices=devices)
    check_mesh(config, mesh)
    compute = config.compute.to_dict()
    compute["attention"] = machine.resolve_attention(compute["attention"], compute["dtype"])
    apply = dit.make_apply(model, **compute, gather=sharding.make_gather(mesh))
    schedule = schedules.make(**config.diffusion)
    train = config.train
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
    return Parts(model, apply, schedule, optimizer, train_step, draw, mesh, shard_optimizer)


def to_json(config):
    """The config as plain JSON values."""
    return json.loads(json.dumps(config.to_dict()))
