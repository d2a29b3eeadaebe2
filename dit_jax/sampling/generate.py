"""Generates images from labels: a DiT, guidance, a sampler, and model units to pixels.

Shapes: N batch, M images in all, S steps, H W grid, C channels, L labels with the null label.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from dit_jax.diffusion import guidance, samplers
from dit_jax.diffusion.process import predictor
from dit_jax.errors import UserError
from dit_jax.machine import prng, sharding
from dit_jax.models import conditions, pixels
from dit_jax.sampling import fields

LABEL = np.uint32(2**32 - 1)  # of the key of an image's label; its noise has keys 0, 1, ...


def make_sampler(process, sampling):
    """(Levels, Sampler) of a `settings.Sampling`."""
    levels = process.levels(sampling.num_steps)
    options = {"eta": sampling.eta} if sampling.sampler == "ddim" else {}
    return levels, samplers.SAMPLERS[sampling.sampler](levels, **options)


def make(apply, config, process, mesh, *, space, sampling, trajectory=False):
    """generate(params, given) -> (N, H, W, C) uint8 images or float32 latents, (N,) bool: jitted.

    given: {"labels": (N,) or weights (N, L), "key_data": (N, 2)} and, unless the keys draw it too,
    "noise", x at level 0. The second result says which images are finite. apply: of
    `models.dit.make_apply`; config: a DiTConfig; space: "pixels" or "latents"; sampling: a
    `settings.Sampling`. trajectory: of `samplers.run`; True returns x at every level, (N, S+1, H,
    W, C), "x0" also the predicted x0, (N, 2, S+1, H, W, C). UserError if an option does not fit.
    """
    check(config, process, sampling)
    levels, sampler = make_sampler(process, sampling)
    shape = (*config.input_size, config.in_channels)
    batch = sharding.of_batch(mesh)

    def generate(params, given):
        given = jax.lax.with_sharding_constraint(given, batch)
        keys, labels = prng.wrap(given["key_data"]), given["labels"]
        model = functools.partial(apply, params)
        if sampling.cfg_scale == 1:
            network = guidance.condition(model, {"y": labels})
        else:
            network = guidance.guide(
                model,
                {"y": labels},
                nulls=conditions.nulls(config, mixed=labels.ndim == 2),
                scale=sampling.cfg_scale,
                channels=sampling.cfg_channels or config.in_channels,
                interval=sampling.cfg_interval,
            )
        predict = predictor(network, process, levels, clip_x0=sampling.clip_x0)
        noise_at = samplers.make_noise(keys, shape, levels.num_steps)
        noise = given["noise"] if "noise" in given else noise_at(-1)
        x = samplers.run(sampler, predict, noise, noise_at=noise_at, trajectory=trajectory)
        x = jnp.moveaxis(x, -len(shape) - 1, 0)  # (N, ...)
        finite = jnp.isfinite(x).all(axis=tuple(range(1, x.ndim)))  # (N,)
        return pixels.to_uint8(x) if space == "pixels" else x, finite

    # jit cannot shard a NumPy array across processes, so inputs enter replicated.
    return jax.jit(generate, in_shardings=(None, sharding.replicated(mesh)), out_shardings=batch)


def run(
    generate,
    params,
    labels,
    *,
    seed,
    batch_size,
    first=0,
    noise=None,
    same_noise=False,
    progress=False,
):
    """One image for each of labels (M,) or (M, L), batch_size at a time: NumPy (M, ...) of `make`.

    They are the images first, first + 1, ... of the seed. Image i depends on (seed, i), its label
    and its noise, and not on batch_size, which is rounded up to a multiple of the number of
    devices. The last batch is padded, so that nothing compiles twice. noise: (M, H, W, C), or None
    for the seed's. same_noise: all images have the noise of image `first`. progress: shows a bar
    with rate and time left, on a terminal. UserError if an image is not finite.
    """
    labels, count = np.asarray(labels), jax.device_count()
    batch_size = -(-min(batch_size, len(labels)) // count) * count
    total = -(-len(labels) // batch_size) * batch_size
    drawn = 1 if same_noise else total
    keys = np.asarray(jax.random.key_data(image_keys(np.uint32(seed), drawn, np.uint32(first))))
    given = {"labels": _pad(labels, total, np.int32 if labels.ndim == 1 else np.float32)}
    given |= {"key_data": _pad(keys, total, keys.dtype)}
    given |= {} if noise is None else {"noise": _pad(noise, total, np.float32)}
    results = []
    with tqdm(total=total, unit="image", disable=None if progress else True) as bar:
        for start in range(0, total, batch_size):
            batch = {name: x[start : start + batch_size] for name, x in given.items()}
            results.append([sharding.to_host(x) for x in generate(params, batch)])
            bar.update(batch_size)
    images, finite = (np.concatenate(x)[: len(labels)] for x in zip(*results, strict=True))
    if not finite.all():
        raise UserError(
            f"samples must be finite, got NaN or infinity in {np.sum(~finite)} of {len(labels)}: "
            "lower cfg_scale, or check the weights"
        )
    return images


def interpolate(labels, count, num_classes):
    """Weights (count, num_classes) that go from the first label over the others to the last."""
    place = np.linspace(0, len(labels) - 1, count)
    before = np.minimum(place.astype(int), len(labels) - 2)  # the label that is left
    share = (place - before)[:, None]  # of the next one
    one_hot = np.eye(num_classes, dtype=np.float32)[labels]
    return (1 - share) * one_hot[before] + share * one_hot[before + 1]


def _pad(x, total, dtype):
    """x (M, ...) -> (total, ...): repeats its rows."""
    return np.resize(x, (total, *x.shape[1:])).astype(dtype)


@functools.partial(jax.jit, static_argnums=1)
def image_keys(seed, count, first=0):
    """The keys of images first .. first + count - 1, from which noise is folded: (count,)."""
    key = prng.key(seed)
    indices = first + jnp.arange(count, dtype=jnp.uint32)
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(indices)


def random_labels(seed, first, count, num_classes):
    """The labels, (count,), of images first, first + 1, ...: uniform, by seed and index."""
    keys = image_keys(np.uint32(seed), count, np.uint32(first))

    def draw(key):
        return jax.random.randint(jax.random.fold_in(key, LABEL), (), 0, num_classes, jnp.int32)

    return np.asarray(jax.vmap(draw)(keys), np.int32)


def images_at_once(config):
    """How many images of a DiTConfig a device should draw at once: about 4,096 tokens of them.

    Float sums depend on the number in the last bit. What must be repeated exactly uses this number.
    """
    return max(8, min(256, 4096 // config.num_tokens))


def count_passes(process, sampling):
    """How many forward passes one image costs; a guided call is two."""
    levels, sampler = make_sampler(process, sampling)
    times, (first, last) = levels.time[:-1], sampling.cfg_interval
    guided = (first <= times) & (times <= last) & (sampling.cfg_scale != 1)
    return int((sampler.passes * (1 + guided)).sum())


def check(config, process, sampling):
    """UserError that names the option of a `settings.Sampling` that does not fit the model."""
    process.levels(sampling.num_steps)
    fields.check(sampling, config, last_time=process.last_time)
