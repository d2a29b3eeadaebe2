"""Builds the parts of a run from its settings; the only module that reads a ConfigDict.

A value that does not fit is a UserError that names its field.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import optax

from dit_jax import settings as settings_lib
from dit_jax.diffusion import fields as diffusion_fields
from dit_jax.diffusion import processes
from dit_jax.diffusion.process import Process, timed
from dit_jax.errors import UserError, of_topic
from dit_jax.machine import devices as devices_lib
from dit_jax.machine import prng, sharding
from dit_jax.models import conditions, dit, flops, routing
from dit_jax.models import fields as model_fields
from dit_jax.sampling import generate
from dit_jax.train import frozen as frozen_lib
from dit_jax.train import optimizer as optimizers
from dit_jax.train import power_ema
from dit_jax.train import state as states
from dit_jax.train import step as train_steps

OPTIMIZER = (
    *("learning_rate", "b1", "b2", "eps", "weight_decay", "clip_norm", "warmup_steps"),
    "decay_steps",
)
STEP = ("class_dropout_prob", "ema_decay", "ema_warmup", "accumulation_steps", "frozen")


def read(config):
    """The Settings of a ConfigDict."""
    return settings_lib.read(config.to_dict())


class Parts(NamedTuple):
    """Everything of a run but its data and its state."""

    model: dit.DiTConfig
    process: Process
    optimizer: optax.GradientTransformation
    train_step: Callable  # (state, batch, key) -> state, metrics
    generate: Callable  # of `sampling.generate.make`
    mesh: jax.sharding.Mesh
    shard_optimizer: bool
    num_averages: int  # power-function averages in the state
    routing: routing.Routing | None  # of tokens that skip blocks in training

    def init(self, key):
        """Random parameters."""
        return dit.init(self.model, key)

    def create_state(self, key):
        """The TrainState at step 0, born sharded."""
        return states.create(self.init, self.optimizer, key, self.mesh, **self.state_options)

    def abstract_state(self):
        """The same as ShapeDtypeStructs with shardings."""
        return states.abstract(
            self.init, self.optimizer, prng.key(0), self.mesh, **self.state_options
        )

    @property
    def train_flops(self):
        """FLOPs of one example in a training step."""
        return _count_flops(self.model, self.process, self.routing)

    @property
    def state_options(self):
        """Of `train.state.create`."""
        return {"shard_optimizer": self.shard_optimizer, "num_averages": self.num_averages}

    def jit_step(self):
        """The jitted training step; it donates the state and keeps its shardings."""
        shardings = states.shardings(self.abstract_state())
        metrics = sharding.replicated(self.mesh)
        return jax.jit(self.train_step, donate_argnums=0, out_shardings=(shardings, metrics))


def parts(settings, devices=None):
    """The Parts of Settings, on all devices or those given; UserError if fields do not fit."""
    with of_topic("model"):
        model = dit.configure(**vars(settings.model))
    sizes = dict(vars(settings.mesh))
    shard_optimizer = sizes.pop("shard_optimizer")
    mesh = sharding.make_mesh(**sizes, devices=devices)
    _check_mesh(settings, mesh)
    with of_topic("compute"):
        compute = settings.compute
        options = {"gather": sharding.make_gather(mesh)}
        options["forward"] = forward = diffusion_fields.is_mean_flow(settings.diffusion)
        attention = compute.attention
        attention = devices_lib.resolve_attention(attention, compute.dtype, forward=forward)
        options["product"] = devices_lib.resolve_product(mesh.devices.ravel())
        apply = dit.make_apply(model, **vars(compute) | {"attention": attention}, **options)
    with of_topic("diffusion"):
        process = processes.make(settings.diffusion)
    apply = timed(apply, process)
    with of_topic("train"):
        route = _make_routing(settings, model)
        if route and forward:
            raise UserError(
                f"route_share must be 0 for process {settings.diffusion.process}, "
                f"got {settings.train.route_share}"
            )
    optimizer, train_step = _make_training(settings, model, process, apply, route)
    space, sampling = settings.data.space, settings.sampling
    with of_topic("sampling"):
        generate_batch = generate.make(apply, model, process, mesh, space=space, sampling=sampling)
    parts = model, process, optimizer, train_step, generate_batch, mesh, shard_optimizer
    return Parts(*parts, num_averages=len(settings.train.averages), routing=route)


def train_passes(settings):
    """What one example of a training step costs, in forward passes."""
    model, process = dit.configure(**vars(settings.model)), processes.make(settings.diffusion)
    work = _count_flops(model, process, _make_routing(settings, model))
    return work / flops.forward_flops(model)


def _make_routing(settings, model):
    return routing.make(model, settings.train.route_share, settings.train.route_blocks)


def _count_flops(model, process, route):
    return flops.train_flops(model, route, **process.passes._asdict())


def _make_training(settings, model, process, apply, route):
    """(the optimizer, the training step)."""
    train = vars(settings.train)
    if settings.train.frozen:
        shapes = jax.eval_shape(lambda: dit.init(model, prng.key(0)))
        frozen_lib.check(shapes, settings.train.frozen)
    with of_topic("train"):
        optimizer = optimizers.make(train["optimizer"], **{name: train[name] for name in OPTIMIZER})
    optimizer = frozen_lib.leave_out(optimizer, settings.train.frozen)
    train_step = train_steps.make_train_step(
        apply,
        process,
        optimizer,
        nulls=conditions.nulls(model),
        routing=route,
        ema_exponents=tuple(map(power_ema.exponent_of, settings.train.averages)),
        **{name: train[name] for name in STEP},
    )
    return optimizer, train_step


def _check_mesh(settings, mesh):
    """UserError if the mesh cannot divide the batch or the heads evenly."""
    train, shards = settings.train, sharding.batch_shards(mesh)
    if train.batch_size % (shards * train.accumulation_steps):
        raise UserError(
            f"train.batch_size must be divisible by {shards} (mesh.data x mesh.fsdp) x "
            f"{train.accumulation_steps} accumulation_steps, got {train.batch_size}"
        )
    model_fields.check_tensor(settings.model, mesh.shape["tensor"])
