"""Pictures of how a LoadedDiT samples: its way from noise to data, and options side by side.

Shapes: M images, S steps. `labels` are M labels or weights (M, num_classes); `names` are their M
titles. All images of a picture have the same noise, so that they differ in what the titles say.
"""

import numpy as np

from dit_jax.diffusion import samplers
from dit_jax.sampling import generate, pictures

NUM_COLUMNS = 8  # levels in a strip
NUM_FRAMES = 60  # levels in an animation, at most


def mixed_titles(labels, count, class_names):
    """The titles of `generate.interpolate`: the name of a class, or the share of the next one."""
    names = pictures.class_titles(labels, class_names)
    places = np.linspace(0, len(labels) - 1, count)
    return [f"{x % 1:.0%}" if x % 1 else names[int(x)] for x in places]


def strip(dit, labels, names, *, columns=0, **options):
    """x_t and the predicted x0 of each label, two rows each, at `columns` levels: a PIL image.

    columns 0: NUM_COLUMNS. options: of `dit.sample`.
    """
    x, x0, times = _follow(dit, labels, columns or NUM_COLUMNS, options)  # (K, M, H, W, C)
    images = np.stack([x, x0]).transpose(2, 0, 1, 3, 4, 5)  # (M, 2, K, H, W, C)
    rows = [title for name in names for title in (f"{name}: x_t", f"{name}: x0")]
    scale = pictures.grid_scale(images.shape[3:5])
    return pictures.table(
        images.reshape(-1, *images.shape[2:]), rows=rows, columns=times, scale=scale
    )


def animation(dit, labels, names, **options):
    """The frames from noise to data, a list of PIL images: x_t above the predicted x0, M columns.

    options: of `dit.sample`.
    """
    x, x0, times = _follow(dit, labels, NUM_FRAMES, options)
    scale = pictures.grid_scale(x.shape[2:4])
    titles = {"rows": ["x_t", "predicted x0"], "columns": names, "scale": scale}
    return [
        pictures.table(np.stack(pair), corner=time, **titles)
        for *pair, time in zip(x, x0, times, strict=True)
    ]


def _follow(dit, labels, count, options):
    """(x, predicted x0, title) of at most `count` levels, evenly from noise to data."""
    levels = dit.levels(**{k: x for k, x in options.items() if k in dit.sampling})
    chosen = np.unique(np.linspace(0, levels.num_steps, count).round().astype(int))
    x, x0 = dit.sample(labels, same_noise=True, trajectory="x0", levels=chosen, **options)
    titles = [f"t = {time:.4g}" for time in levels.time[chosen[:-1]]]
    return x, x0, [*titles, "sample"]


def grid(dit, labels, names, *, option, values, **options):
    """A row of images for each value of an option of `dit.sample`: a PIL image."""
    same = {"same_noise": True}
    if option == "num_steps":  # the noise of a seed depends on it
        same = {"noise": _noise(dit, len(labels), options.get("seed", 0))}
    images = [dit.sample(labels, **same, **options | {option: x}) for x in values]
    scale = pictures.grid_scale(images[0].shape[1:3])
    rows = [f"{option} {x:g}" if isinstance(x, float) else f"{option} {x}" for x in values]
    return pictures.table(np.stack(images), rows=rows, columns=names, scale=scale)


def _noise(dit, count, seed):
    """The noise with which 1,000 steps would begin, the same for M images: (M, H, W, C)."""
    shape = (*dit.config.input_size, dit.config.in_channels)
    keys = generate.image_keys(np.uint32(seed), 1)
    noise = dit.process.noise_scale * samplers.make_noise(keys, shape, 1000)(-1)
    return np.repeat(noise, count, axis=0)
