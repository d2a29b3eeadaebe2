"""One training step: make examples, differentiate, update, average.

Shapes: N global batch, C channels, A micro-batches that are accumulated; x0 (N, ..., C) has any
number of axes.
"""

import functools

import jax
import jax.numpy as jnp
import optax

from dit_jax import compat
from dit_jax.diffusion.process import Network
from dit_jax.models import pixels, vae
from dit_jax.train import ema as ema_lib
from dit_jax.train import frozen as frozen_lib
from dit_jax.train.state import TrainState


def to_x0(batch, key):
    """x0 (N, ..., C) in model units, of a batch that has one of three arrays.

    "image": uint8 pixels. "x0": itself. "posterior" (N, ..., 2C): mean and log variance of latents
    in model units, from which x0 is drawn.
    """
    if "posterior" in batch:
        mean = batch["posterior"][..., : batch["posterior"].shape[-1] // 2]
        return vae.sample(batch["posterior"], jax.random.normal(key, mean.shape, jnp.float32))
    return batch["x0"] if "x0" in batch else pixels.to_unit(batch["image"])


def make_examples(key, batch, process, *, class_dropout_prob, routing=None):
    """A batch with "label" (N,) -> {"x0", "t", "noise", "given": {"y": (N,)}, "dropped": (N,)}.

    A pure function of the key over global arrays: the same on any number of devices. dropped: with
    probability class_dropout_prob the network gets the null label; absent if that is 0. With a
    `models.routing.Routing` there is "kept" (N, K) too, the tokens that pass all blocks.
    """
    t_key, noise_key, drop_key, posterior_key = jax.random.split(key, 4)
    x0, y = to_x0(batch, posterior_key), batch["label"]
    t = process.draw_time(t_key, x0.shape[:1])
    noise = jax.random.normal(noise_key, x0.shape, jnp.float32)
    examples = {"x0": x0, "t": t, "noise": noise, "given": {"y": y}}
    if class_dropout_prob:
        dropped = jax.random.bernoulli(drop_key, jnp.float32(class_dropout_prob), y.shape)
        examples["dropped"] = dropped
    if routing is not None:
        examples["kept"] = routing.draw(jax.random.fold_in(drop_key, 1), len(x0))
    return examples


def make_loss(apply, process, nulls, routing=None):
    """loss_fn(params, examples) -> scalar, {"loss", ...}: means over the examples."""

    def loss_fn(params, examples):
        route = {} if routing is None else {"route": (routing, examples["kept"])}
        model = functools.partial(apply, params, **route)
        network = Network(model, examples["given"], nulls, examples.get("dropped", False))
        terms = process.losses(network, examples["x0"], examples["t"], examples["noise"])
        means = jax.tree.map(jnp.mean, terms)
        return means["loss"], means

    return loss_fn


def make_gradients(loss_fn, accumulation_steps):
    """gradients(params, examples) -> grads, metrics, summed over A micro-batches in turn."""
    value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)

    def split(x):
        # Strided, so that every micro-batch is sharded over all devices, as the whole batch is.
        return x.reshape(-1, accumulation_steps, *x.shape[1:]).swapaxes(0, 1)  # (A, N/A, ...)

    def gradients(params, examples):
        if accumulation_steps == 1:
            (_, metrics), grads = value_and_grad(params, examples)
            return grads, metrics

        def add(total, micro_batch):
            (_, metrics), grads = value_and_grad(params, micro_batch)
            return jax.tree.map(jnp.add, total, (grads, metrics)), None

        micro_batches = jax.tree.map(split, examples)
        first = jax.tree.map(lambda x: x[0], micro_batches)
        _, metrics = jax.eval_shape(loss_fn, params, first)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (params, metrics))
        total, _ = jax.lax.scan(add, zeros, micro_batches)
        return jax.tree.map(lambda x: x / accumulation_steps, total)

    return gradients


def make_train_step(
    apply,
    process,
    optimizer,
    *,
    nulls,
    class_dropout_prob,
    ema_decay,
    ema_warmup,
    accumulation_steps,
    frozen=(),
    ema_exponents=(),
    routing=None,
):
    """train_step(state, batch, key) -> state, metrics. key: the run's; the step is folded into it.

    apply(params, x, t=..., **given) is a DiT, process a `diffusion.process.Process`, nulls {name:
    null value} of the conditions. frozen: patterns of the parameters that are not trained; the
    optimizer, of `train.frozen.leave_out`, sees the others only, and so does grad_norm.
    ema_exponents: of the power-function averages in the state. routing: a `models.routing.Routing`
    of tokens that skip blocks, or None.
    """
    loss_fn = make_loss(apply, process, nulls, routing)

    def train_step(state, batch, key):
        examples = make_examples(
            jax.random.fold_in(key, state.step),
            batch,
            process,
            class_dropout_prob=class_dropout_prob,
            routing=routing,
        )
        trained, rest = frozen_lib.split(state.params, frozen)

        def loss_of_trained(trained, examples):
            return loss_fn(frozen_lib.merge(trained, rest), examples)

        grads, metrics = make_gradients(loss_of_trained, accumulation_steps)(trained, examples)
        with jax.named_scope("update"), compat.default_arithmetic():
            updates, opt_state = optimizer.update(grads, state.opt_state, trained)
            params = frozen_lib.merge(optax.apply_updates(trained, updates), rest)
            metrics = metrics | {"grad_norm": optax.tree.norm(grads)}
        with jax.named_scope("update"):
            decay = ema_lib.decay_at(state.step, decay=ema_decay, warmup=ema_warmup)
            ema = ema_lib.update(state.ema, params, decay=decay)  # of the new parameters
            weights = [ema_lib.power_weight(state.step, exponent=each) for each in ema_exponents]
            averages = tuple(
                ema_lib.mix(average, params, weight=weight)
                for average, weight in zip(state.averages, weights, strict=True)
            )
        return TrainState(state.step + 1, params, ema, opt_state, averages), metrics

    return train_step
