"""Generates images from labels: a DiT, guidance, a sampler, and model units to pixels.

Shapes: N batch, M images in all, H W grid, C channels.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from dit_jax.diffusion import guidance, samplers
from dit_jax.diffusion.process import predictor
from dit_jax.errors import UserError
from dit_jax.machine import sharding
from dit_jax.models import conditions, pixels


def make_sampler(process, sampling):
    """(Levels, Sampler) of a `settings.Sampling`."""
    levels = process.levels(sampling.num_steps)
    options = {"eta": sampling.eta} if sampling.sampler == "ddim" else {}
    return levels, samplers.SAMPLERS[sampling.sampler](levels, **options)


def make(apply, config, process, mesh, *, space, sampling):
    """generate(params, labels (N,), key_data (N, 2)) -> uint8 images, or float32 latents: jitted.

    apply: of `models.dit.make_apply`; config: a DiTConfig; space: "pixels" or "latents"; sampling:
    a `settings.Sampling`. UserError if an option does not fit the model.
    """
    check(config, process, sampling)
    levels, sampler = make_sampler(process, sampling)
    shape = (*config.input_size, config.in_channels)
    batch = sharding.of_batch(mesh)

    def generate(params, labels, key_data):
        labels = jax.lax.with_sharding_constraint(labels, batch)
        keys = jax.random.wrap_key_data(jax.lax.with_sharding_constraint(key_data, batch))
        model, given = functools.partial(apply, params), {"y": labels}
        if sampling.cfg_scale == 1:
            network = guidance.condition(model, given)
        else:
            network = guidance.guide(
                model,
                given,
                nulls=conditions.nulls(config),
                scale=sampling.cfg_scale,
                channels=sampling.cfg_channels or config.in_channels,
                interval=sampling.cfg_interval,
            )
        predict = predictor(network, process, levels, clip_x0=sampling.clip_x0)
        noise_at = samplers.make_noise(keys, shape, levels.num_steps)
        x = samplers.run(sampler, predict, noise_at(-1), noise_at=noise_at)
        return pixels.to_uint8(x) if space == "pixels" else x

    # jit cannot shard a NumPy array across processes, so inputs enter replicated.
    replicated = sharding.replicated(mesh)
    return jax.jit(generate, in_shardings=(None, replicated, replicated), out_shardings=batch)


def run(generate, params, labels, *, seed, batch_size, progress=False):
    """One image for each of labels (M,), batch_size at a time: NumPy (M, H, W, C).

    generate: of `make`. Image i depends on (seed, i, labels[i]) and not on batch_size, which is
    rounded up to a multiple of the number of devices. The last batch is padded, so that nothing
    compiles twice. progress: shows a bar with rate and time left, on a terminal.
    """
    labels = np.asarray(labels, np.int32)
    count = jax.device_count()
    batch_size = -(-min(batch_size, len(labels)) // count) * count
    padded = np.resize(labels, -(-len(labels) // batch_size) * batch_size)
    batches = padded.reshape(-1, batch_size)
    keys = jax.random.key_data(image_keys(np.uint32(seed), len(padded)))
    keys = np.asarray(keys).reshape(-1, batch_size, keys.shape[-1])
    images = []
    with tqdm(total=len(padded), unit="image", disable=None if progress else True) as bar:
        for batch, key_data in zip(batches, keys, strict=True):
            images.append(sharding.to_host(generate(params, batch, key_data)))
            bar.update(batch_size)
    return np.concatenate(images)[: len(labels)]


@functools.partial(jax.jit, static_argnums=1)
def image_keys(seed, count):
    """The keys of images 0 .. count - 1, from which the noise of every step is folded: (count,)."""
    key = jax.random.key(seed)
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(count))


def count_passes(process, sampling):
    """How many forward passes one image costs; a guided call is two."""
    levels, sampler = make_sampler(process, sampling)
    times, (first, last) = levels.time[:-1], sampling.cfg_interval
    guided = (first <= times) & (times <= last) & (sampling.cfg_scale != 1)
    return int((sampler.passes * (1 + guided)).sum())


def check(config, process, sampling):
    """UserError that names the option of a `settings.Sampling` that does not fit the model."""
    name, eta, scale = sampling.sampler, sampling.eta, sampling.cfg_scale
    if name not in samplers.SAMPLERS:
        raise UserError(f"sampler must be one of {', '.join(samplers.SAMPLERS)}, got {name!r}")
    process.levels(sampling.num_steps)
    if not 0 <= eta <= 1:
        raise UserError(f"eta must be in 0 .. 1, got {eta}")
    if eta and name != "ddim":
        raise UserError(f"eta must be 0 for {name}, which has none, got {eta}")
    if scale < 0:
        raise UserError(f"cfg_scale must be 0 or more, got {scale}")
    if scale != 1 and not config.null_label:
        raise UserError(f"cfg_scale must be 1 for a model without a null label, got {scale}")
    if not 0 <= sampling.cfg_channels <= config.in_channels:
        raise UserError(
            f"cfg_channels must be in 0 .. {config.in_channels}, got {sampling.cfg_channels}"
        )
    interval = sampling.cfg_interval
    if len(interval) != 2 or not all(type(t) in (int, float) for t in interval):
        raise UserError(f"cfg_interval must be two numbers, got {interval!r}")
    if not 0 <= interval[0] <= interval[1] <= process.last_time:
        raise UserError(
            f"cfg_interval must be first <= last in 0 .. {process.last_time}, got {interval}"
        )
