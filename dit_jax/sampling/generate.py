"""Generates images from labels: a DiT, guidance, a sampler, and model units to pixels.

Shapes: N batch, M images in all, S steps, H W grid, C channels, L labels with the null label.
"""

import dataclasses
import functools
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from dit_jax.diffusion import caches, guidance, inversion, samplers, solvers, spacings
from dit_jax.diffusion import process as process_lib
from dit_jax.errors import UserError
from dit_jax.machine import prng, sharding
from dit_jax.models import conditions, flops, pixels
from dit_jax.sampling import fields

LABEL = np.uint32(2**32 - 1)  # of the key of an image's label; its noise has keys 0, 1, ...


class Plan(NamedTuple):
    """How a `settings.Sampling` goes from noise to data.

    scales: of the guidance of each step, (S,); None without guidance. cache: None if every step
    runs all passes of the network.
    """

    levels: process_lib.Levels
    sampler: samplers.Sampler
    scales: np.ndarray | None
    cache: caches.Cache | None

    def passes(self):
        """How many passes through the blocks an image takes in each step, (S,)."""
        if self.cache:
            return self.sampler.passes * self.cache.passes()
        return self.passes_without_cache()

    def passes_without_cache(self):
        """The same if nothing were forecast."""
        guided = 0 if self.scales is None else self.scales != 1
        return self.sampler.passes * (1 + guided)


def make_plan(process, sampling):
    """The Plan of a `settings.Sampling`."""
    name = sampling.sampler
    levels = make_levels(process, sampling)
    scales, options = None, {}
    if sampling.cfg_scale != 1:
        scales = guidance.scales(
            levels,
            scale=sampling.cfg_scale,
            interval=sampling.cfg_interval,
            schedule=sampling.cfg_schedule,
        )
    if name == "ddim":
        options = {"eta": sampling.eta}
    elif name == "sde":
        options = {"form": sampling.sde_noise}
    elif name in ("dpm2m", "unipc") and scales is not None:
        options = {"restarts": guidance.edges(scales)}
    cache = caches.make(
        *(levels, scales),
        schedule=sampling.cache,
        guidance_schedule=sampling.cache_guidance,
        order=sampling.cache_order,
        fit=sampling.cache_fit,
    )
    return Plan(levels, solvers.SAMPLERS[name](levels, **options), scales, cache)


def make_levels(process, sampling):
    """The Levels of a `settings.Sampling`."""
    spacing = sampling.spacing
    return spacings.levels(
        process,
        sampling.num_steps,
        spacing=spacings.choose(sampling.sampler) if spacing == "auto" else spacing,
        shift=sampling.shift,
        last_step=sampling.sde_last if sampling.sampler == "sde" else 0.0,
    )


def make(apply, config, process, mesh, *, space, sampling, trajectory=False):
    """generate(params, given) -> (N, H, W, C) uint8 images or float32 latents, (N,) bool: jitted.

    given: {"labels": (N,) or weights (N, L), "key_data": (N, 2)} and, unless the keys draw it too,
    "noise", x at level 0. The second result says which images are finite. apply: of
    `models.dit.make_apply`; config: a DiTConfig; space: "pixels" or "latents"; sampling: a
    `settings.Sampling`. trajectory: of `samplers.run`; True returns x at every level, (N, S+1, H,
    W, C), "x0" also the predicted x0, (N, 2, S+1, H, W, C). UserError if an option does not fit.
    """
    check(config, process, sampling)
    plan, shape = make_plan(process, sampling), (*config.input_size, config.in_channels)

    def generate(params, given):
        given = jax.lax.with_sharding_constraint(given, sharding.of_batch(mesh))
        model = functools.partial(apply, params)
        noise_at = samplers.make_noise(prng.wrap(given["key_data"]), shape, plan.levels.num_steps)
        noise = given["noise"] if "noise" in given else process.noise_scale * noise_at(-1)
        network = _make_network(model, given["labels"], config, sampling, plan)
        options = {"clip_x0": sampling.clip_x0, "scales": plan.scales}
        make_predict = caches.predictor if plan.cache else process_lib.predictor
        predict = make_predict(network, process, plan.levels, **options)
        options = {"memory": network.start(noise)} if plan.cache else {}
        options |= {"noise_at": noise_at, "trajectory": trajectory}
        x = samplers.run(plan.sampler, predict, noise, **options)
        x = jnp.moveaxis(x, -len(shape) - 1, 0)  # (N, ...)
        return pixels.to_uint8(x) if space == "pixels" else x, _is_finite(x)

    return _jit(generate, mesh)


def make_inversion(apply, config, process, mesh, *, sampling, iterations):
    """invert(params, given) -> noise (N, H, W, C), (N,) bool: jitted, the inverse of `make`.

    given: as of `make`, but "noise" is data, x at the last level. The way back is that of DDIM
    without guidance along the levels of `sampling`. iterations: of `inversion.run`.
    """
    sampling = dataclasses.replace(
        sampling,
        sampler="ddim",
        eta=0.0,
        cfg_scale=1.0,
        clip_x0=False,
        cache="none",
        cache_guidance="none",
    )
    check(config, process, sampling)
    plan = make_plan(process, sampling)

    def invert(params, given):
        given = jax.lax.with_sharding_constraint(given, sharding.of_batch(mesh))
        model = functools.partial(apply, params)
        network = _make_network(model, given["labels"], config, sampling, plan)
        predict = process_lib.predictor(network, process, plan.levels)
        x = inversion.run(predict, given["noise"], plan.levels, iterations=iterations)
        return x, _is_finite(x)

    return _jit(invert, mesh)


def _make_network(model, labels, config, sampling, plan):
    """The network of labels (N,) or weights (N, L), with the guidance and the cache of a Plan."""
    given, options = _conditions(labels, config, sampling), {}
    if plan.scales is not None:
        options["nulls"] = conditions.nulls(config, mixed=labels.ndim == 2)
        options["channels"] = sampling.cfg_channels or config.in_channels
    if plan.cache:
        return caches.network(model, given, plan.cache, **options)
    return guidance.guide(model, given, **options) if options else guidance.condition(model, given)


def _conditions(labels, config, sampling):
    """{name: (N, ...)}: the labels, and the guidance of a model that has it as a condition."""
    given = {"y": labels}
    if "omega" in config.conditions:
        first, last = sampling.omega_interval
        values = {"omega": sampling.omega, "t_min": first, "t_max": last}
        given |= {k: jnp.full(labels.shape[:1], v, jnp.float32) for k, v in values.items()}
    return given


def _is_finite(x):
    """Which of x (N, ...) are finite, (N,)."""
    return jnp.isfinite(x).all(axis=tuple(range(1, x.ndim)))


def _jit(function, mesh):
    """jit of function(params, given) -> sharded results."""
    # jit cannot shard a NumPy array across processes, so inputs enter replicated.
    options = {"in_shardings": (None, sharding.replicated(mesh))}
    return jax.jit(function, out_shardings=sharding.of_batch(mesh), **options)


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
    seconds=None,
):
    """One image for each of labels (M,) or (M, L), batch_size at a time: NumPy (M, ...) of `make`.

    They are the images first, first + 1, ... of the seed. Image i depends on (seed, i), its label
    and its noise, and not on batch_size, which is rounded up to a multiple of the number of
    devices. The last batch is padded, so that nothing compiles twice. noise: (M, H, W, C), or None
    for the seed's. same_noise: all images have the noise of image `first`. progress: shows a bar
    with rate and time left, on a terminal. seconds: a list that gets what each batch took, without
    compilation. UserError if an image is not finite.
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
            if seconds is not None:
                generate.lower(params, batch).compile()  # which the call then finds done
            began = time.perf_counter()
            results.append([sharding.to_host(x) for x in generate(params, batch)])
            if seconds is not None:
                seconds.append(time.perf_counter() - began)
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


def count_calls(process, sampling):
    """How many network calls one image costs; a call whose blocks a cache forecasts is none."""
    plan = make_plan(process, sampling)
    computed = plan.cache.given.computed if plan.cache else 1
    return int((plan.sampler.passes * computed).sum())


def count_passes(process, sampling):
    """How many forward passes one image costs: two in a guided call, less what is forecast."""
    return int(make_plan(process, sampling).passes().sum())


def count_flops(config, process, sampling):
    """FLOPs of one image, with what forecast passes cost: embedders and final layer."""
    plan = make_plan(process, sampling)
    passes = int(plan.passes().sum())
    forecast = int(plan.passes_without_cache().sum()) - passes
    return passes * flops.forward_flops(config) + forecast * flops.forecast_flops(config)


def cache_bytes(config, process, sampling, dtype):
    """How much memory the cache of one image takes, for the dtype of the arithmetic; 0 without."""
    cache = make_plan(process, sampling).cache
    size = config.num_tokens * config.hidden_size * jnp.dtype(dtype).itemsize
    return cache.num_kept * size if cache else 0


def check(config, process, sampling):
    """UserError that names the option of a `settings.Sampling` that does not fit the model."""
    fields.check(sampling, config, last_time=process.last_time)
    plan = make_plan(process, sampling)
    (first, last), time = sampling.cfg_interval, plan.levels.time[:-1]
    if plan.scales is not None and not ((first <= time) & (time <= last)).any():
        raise UserError(
            f"cfg_interval must hold the time of a step, {time[0]:g} .. {time[-1]:g}, unless "
            f"cfg_scale is 1, got {sampling.cfg_interval}"
        )
