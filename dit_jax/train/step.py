"""One training step: draw, differentiate, update, average.

Shapes: N global batch, H W grid, C channels, A accumulated micro-batches.
"""

import jax
import jax.numpy as jnp
import optax

from dit_jax.diffusion import gaussian, losses
from dit_jax.models import pixels, vae
from dit_jax.train import ema as ema_lib
from dit_jax.train.state import TrainState


def to_x0(batch, key):
    """x0 (N, H, W, C) in model units, of uint8 pixels, of latents, or drawn from their moments.

    Moments (N, H, W, 2C) are mean and log variance of latents in model units.
    """
    if "moments" in batch:
        mean = batch["moments"][..., : batch["moments"].shape[-1] // 2]
        return vae.sample(batch["moments"], jax.random.normal(key, mean.shape))
    image = batch["image"]
    return pixels.to_unit(image) if image.dtype == jnp.uint8 else image


def draw(key, batch, schedule, *, null_label, class_dropout_prob):
    """A batch {"image" or "moments", "label" (N,)} -> {"x0", "y", "t", "noise"}.

    A pure function of the key over global arrays: the same on any number of devices. Labels turn
    into the null label with probability class_dropout_prob.
    """
    t_key, noise_key, drop_key, posterior_key = jax.random.split(key, 4)
    x0, y = to_x0(batch, posterior_key), batch["label"]
    if class_dropout_prob:
        dropped = jax.random.bernoulli(drop_key, class_dropout_prob, y.shape)
        y = jnp.where(dropped, null_label, y)
    t = jax.random.randint(t_key, y.shape, 0, schedule.num_steps)
    return {"x0": x0, "y": y, "t": t, "noise": jax.random.normal(noise_key, x0.shape)}


def make_loss(apply, schedule):
    """loss_fn(params, example) -> scalar, {"loss", "mse", "vb"}: means over the examples."""

    def loss_fn(params, example):
        x0, t, noise = example["x0"], example["t"], example["noise"]
        x_t = gaussian.q_sample(schedule, x0, t, noise)
        out = apply(params, x_t, t, example["y"])
        terms = losses.objective(schedule, out, x0=x0, x_t=x_t, t=t, noise=noise)
        means = jax.tree.map(jnp.mean, terms)
        return means["loss"], means

    return loss_fn


def make_gradients(loss_fn, accumulation_steps):
    """gradients(params, examples) -> grads, metrics, over A micro-batches one after another."""
    value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)

    def split(x):
        # Strided, so that every micro-batch lies on all devices as the whole batch does.
        return x.reshape(-1, accumulation_steps, *x.shape[1:]).swapaxes(0, 1)  # (A, N/A, ...)

    def gradients(params, examples):
        if accumulation_steps == 1:
            (_, metrics), grads = value_and_grad(params, examples)
            return grads, metrics

        def add(total, micro_batch):
            (_, metrics), grads = value_and_grad(params, micro_batch)
            return jax.tree.map(jnp.add, total, (grads, metrics)), None

        micro_batches = jax.tree.map(split, examples)
        shapes = jax.eval_shape(value_and_grad, params, jax.tree.map(lambda x: x[0], micro_batches))
        (_, metrics), grads = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        total, _ = jax.lax.scan(add, (grads, metrics), micro_batches)
        return jax.tree.map(lambda x: x / accumulation_steps, total)

    return gradients


def make_train_step(
    apply,
    schedule,
    optimizer,
    *,
    null_label,
    class_dropout_prob,
    ema_decay,
    ema_warmup,
    accumulation_steps,
):
    """train_step(state, batch, key) -> state, metrics. The key is the run's; the step folds in."""
    gradients = make_gradients(make_loss(apply, schedule), accumulation_steps)

    def train_step(state, batch, key):
        examples = draw(
            jax.random.fold_in(key, state.step),
            batch,
            schedule,
            null_label=null_label,
            class_dropout_prob=class_dropout_prob,
        )
        grads, metrics = gradients(state.params, examples)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        decay = ema_lib.decay_at(state.step, decay=ema_decay, warmup=ema_warmup)
        ema = ema_lib.update(state.ema, params, decay=decay)  # of the new parameters
        metrics = metrics | {"grad_norm": optax.tree.norm(grads)}
        return TrainState(state.step + 1, params, ema, opt_state), metrics

    return train_step
