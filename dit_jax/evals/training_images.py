"""The images that a run is trained on, as its samples are: the reference of its scores.

Shapes: N images, H W grid, C channels.
"""

import concurrent.futures
import dataclasses
import math
import os

import numpy as np

from dit_jax.data import digits, feed, latents
from dit_jax.data.arrays import Arrays
from dit_jax.errors import UserError
from dit_jax.machine import cluster, disk
from dit_jax.models import pixels

READ = 512  # examples at a time
MAX_BYTES = 2**30  # of the images that are drawn
HELD_OUT = {"fashion": ("test",), "images": ("validation", "val", "test")}  # splits, best first


def check(settings, fed):
    """UserError if the examples of a Feed are no images that its model's samples compare with."""
    if len(settings.model.input_size) != 2:
        raise UserError(
            f"model.input_size must have 2 axes to compare images, got {settings.model.input_size}"
        )
    if settings.data.space == "latents" and not fed.decoder:
        raise UserError(
            "data.vae must be given to compare images: what `dit-convert vae` wrote decodes "
            f"the samples and latents of {settings.data.source}"
        )


def draw(settings, count, *, seed=0, fed=None):
    """At most count training images, uint8 and without flips, in a random order: Arrays.

    There are fewer if they would take more than MAX_BYTES. fed: the open Feed of the settings; None
    opens it. They have the size of decoded samples. Latents are decoded too, so that the loss of
    the autoencoder is not the model's. The order depends on the seed and on the number of examples
    only. Every process must call it, and gets the same. UserError as `check`.
    """
    fed = fed or feed.make(settings)
    check(settings, fed)
    factor = fed.decoder.config.downsampling if fed.decoder else 1
    num_bytes = 3 * factor**2 * math.prod(settings.model.input_size)
    count = min(count, max(MAX_BYTES // num_bytes, 1))
    order = np.random.default_rng(seed).permutation(len(fed.source))[:count]
    images, labels = [], []
    for start in range(0, len(order), READ):
        with cluster.together():  # one process may read a corrupt file
            examples = _read(fed.source, order[start : start + READ])
        images.append(_to_images(examples, fed))
        labels += [example["label"] for example in examples]
    return Arrays(np.concatenate(images), np.array(labels, np.int32), tuple(fed.class_names))


def held_out(settings, count, *, seed=0):
    """The same of images that the run was not trained on; None if its data have none."""
    data = settings.data
    if data.source == "digits":
        _, rest = digits.load(data.classes)
        order = np.random.default_rng(seed).permutation(len(rest))[:count]
        return Arrays(rest.image[order], rest.label[order], rest.class_names)
    known = _splits(data)
    for split in HELD_OUT.get(data.source, ()):
        if split in known and split != data.split:
            other = dataclasses.replace(data, split=split)
            return draw(dataclasses.replace(settings, data=other), count, seed=seed)
    return None


def _splits(data):
    """The names of the splits that the data have."""
    if data.source == "images":
        return disk.read_json(disk.path(data.path) / "manifest.json").get("splits", {})
    return HELD_OUT.get(data.source, ())


def _read(source, indices):
    """The examples with these indices, read in threads."""
    with concurrent.futures.ThreadPoolExecutor(max(2, os.cpu_count() or 1)) as threads:
        return list(threads.map(lambda index: source[int(index)], indices))


def _to_images(examples, fed):
    """uint8 (N, H, W, C) of examples of a Feed."""
    if "image" in examples[0]:
        return np.stack([example["image"] for example in examples])
    if "x0" in examples[0]:
        x0 = np.stack([example["x0"] for example in examples])
        return np.asarray(pixels.to_uint8(x0))
    moments = np.stack([latents.pick_first(example, None)["moments"] for example in examples])
    posterior = fed.prepare({"moments": moments, "label": np.zeros(len(moments), np.int32)})
    mean = np.split(np.asarray(posterior["posterior"]), 2, axis=-1)[0]
    return fed.decoder.decode(mean)
