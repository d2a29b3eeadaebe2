"""From labels to images: a DiT, guidance, a sampler and the step from model units to pixels.

Shapes: N batch, H W grid, C channels.
"""

import functools
import math
import numbers

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
from tqdm import tqdm

from dit_jax.diffusion import guidance, samplers, schedules
from dit_jax.errors import UserError
from dit_jax.machine import sharding
from dit_jax.models import pixels

GREY = 96  # between the images of a grid
SPACES = ("pixels", "latents")  # what a model's units stand for


def make_sampler(
    apply,
    config,
    schedule,
    mesh,
    *,
    space,
    sampler,
    num_steps,
    eta,
    clip_x0,
    cfg_scale,
    cfg_channels,
    cfg_interval,
):
    """draw(params, labels (N,), key_data (N, 2)) -> uint8 images, or float32 latents: jitted.

    num_steps: a spacing of `schedules.respace`, or a number. eta is DDIM's. cfg_scale 1 is no
    guidance; cfg_channels 0 guides all channels; cfg_interval counts the steps of `schedule`.
    """
    check_sampling(
        config,
        schedule,
        space=space,
        sampler=sampler,
        num_steps=num_steps,
        eta=eta,
        clip_x0=clip_x0,
        cfg_scale=cfg_scale,
        cfg_channels=cfg_channels,
        cfg_interval=cfg_interval,
    )
    short = schedules.respace(schedule, str(num_steps))
    options = {"clip_x0": clip_x0} | ({"eta": eta} if sampler == "ddim" else {})
    shape = (*config.input_size, config.in_channels)

    batch = sharding.of_batch(mesh)

    def draw(params, labels, key_data):
        labels = jax.lax.with_sharding_constraint(labels, batch)
        keys = jax.random.wrap_key_data(jax.lax.with_sharding_constraint(key_data, batch))
        model = functools.partial(apply, params)
        if cfg_scale == 1:
            denoise = guidance.condition(model, labels)
        else:
            denoise = guidance.guide(
                model,
                labels,
                null_label=config.num_classes,
                scale=cfg_scale,
                channels=cfg_channels or config.in_channels,
                interval=cfg_interval,
            )
        x = samplers.draw_noise(keys, short.num_steps, shape)
        x = samplers.SAMPLERS[sampler](denoise, x, short, keys=keys, **options)
        return pixels.to_uint8(x) if space == "pixels" else x

    # Whole on every process at first: of NumPy's arrays jax divides none among several.
    whole = sharding.replicated(mesh)
    return jax.jit(draw, in_shardings=(None, whole, whole), out_shardings=batch)


def draw_all(draw, params, labels, *, seed, batch_size, progress=False):
    """Draws one image for each of labels (M,), batch_size at a time: NumPy (M, H, W, C).

    Image i depends on (seed, i, labels[i]) and not on batch_size, which is rounded up to a multiple
    of the devices. The last batch is filled up, so that nothing compiles twice. progress: shows a
    bar with rate and time left, on a terminal.
    """
    labels = np.asarray(labels, np.int32)
    count = jax.device_count()
    batch_size = -(-min(batch_size, len(labels)) // count) * count
    padded = np.resize(labels, -(-len(labels) // batch_size) * batch_size)
    batches = padded.reshape(-1, batch_size)
    keys = jax.random.key_data(sample_keys(np.uint32(seed), len(padded)))
    keys = np.asarray(keys).reshape(-1, batch_size, keys.shape[-1])
    images = []
    with tqdm(total=len(padded), unit="image", disable=None if progress else True) as bar:
        for y, k in zip(batches, keys, strict=True):
            images.append(sharding.to_host(draw(params, y, k)))
            bar.update(batch_size)
    return np.concatenate(images)[: len(labels)]


@functools.partial(jax.jit, static_argnums=1)
def sample_keys(seed, count):
    """The keys of images 0 .. count - 1, whose folds are the noise of every step: (count,)."""
    key = jax.random.key(seed)
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(count))


def grid(images, *, columns=0, scale=1):
    """uint8 images (N, H, W, C), C 1 or 3, each pixel `scale` times, side by side: a PIL image.

    columns 0 makes the grid about square. A grey line of max(2, scale) pixels parts the images.
    """
    columns = min(columns or math.ceil(math.sqrt(len(images))), len(images))
    rows = -(-len(images) // columns)
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    line = max(2, scale)
    images = np.pad(images, ((0, 0), (0, line), (0, line), (0, 0)), constant_values=GREY)
    _, height, width, channels = images.shape
    canvas = np.full((rows * columns, height, width, channels), GREY, np.uint8)
    canvas[: len(images)] = images
    canvas = canvas.reshape(rows, columns, height, width, channels).swapaxes(1, 2)
    canvas = canvas.reshape(rows * height, columns * width, channels)[:-line, :-line]
    return Image.fromarray(canvas[..., 0] if channels == 1 else canvas)


def write_all(images, folder):
    """Writes uint8 images (N, H, W, C), C 1 or 3, as 00000.png, 00001.png, ... of a new folder."""
    folder.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(
            folder / f"{i:05d}.png"
        )


def grid_scale(size):
    """How often to repeat a pixel so that a tiny image can be seen: 8 for (8, 8)."""
    return max(1, 64 // max(size))


def check_sampling(
    config,
    schedule,
    *,
    space,
    sampler,
    num_steps,
    eta,
    clip_x0,
    cfg_scale,
    cfg_channels,
    cfg_interval,
):
    """UserError that names the option of `make_sampler` that does not fit."""
    choices = {"space": (space, SPACES), "sampler": (sampler, tuple(samplers.SAMPLERS))}
    choices["clip_x0"] = (clip_x0, (True, False))
    for name, (value, allowed) in choices.items():
        if value not in allowed:
            names = ", ".join(map(str, allowed))
            raise UserError(f"{name} must be one of {names}, got {value!r}")
    schedules.keep_steps(schedule.num_steps, str(num_steps))
    for name, value in {"eta": eta, "cfg_scale": cfg_scale}.items():
        if not isinstance(value, numbers.Real) or not math.isfinite(value):
            raise UserError(f"{name} must be a finite number, got {value!r}")
    if not 0 <= eta <= 1:
        raise UserError(f"eta must be in 0 .. 1, got {eta}")
    if eta and sampler != "ddim":
        raise UserError(f"eta must be 0 for {sampler}, which has none, got {eta}")
    if cfg_scale < 0:
        raise UserError(f"cfg_scale must be 0 or more, got {cfg_scale}")
    if cfg_scale != 1 and not config.null_label:
        raise UserError(f"cfg_scale must be 1 for a model without a null label, got {cfg_scale}")
    if not _is_whole(cfg_channels) or not 0 <= cfg_channels <= config.in_channels:
        raise UserError(f"cfg_channels must be in 0 .. {config.in_channels}, got {cfg_channels!r}")
    _check_interval(cfg_interval, schedule.num_steps)


def _check_interval(interval, num_steps):
    is_pair = isinstance(interval, (tuple, list)) and len(interval) == 2
    if not is_pair or not all(map(_is_whole, interval)):
        raise UserError(f"cfg_interval must be two whole numbers, got {interval!r}")
    first, last = interval
    if not 0 <= first <= last < num_steps:
        raise UserError(f"cfg_interval must be first, last in 0 .. {num_steps - 1}, got {interval}")


def _is_whole(value):
    return isinstance(value, numbers.Integral)
