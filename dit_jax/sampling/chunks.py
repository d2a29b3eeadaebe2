"""Applies a network to images, always the same number of them at once on each device.

Shapes: N images, H W grid, C channels.
"""

import jax
import numpy as np
from tqdm import tqdm

from dit_jax.errors import UserError
from dit_jax.machine import sharding


class InChunks:
    """apply(params, images) over any number of images, `per_device` at once on each device.

    So the outputs of an image depend neither on how many images a call has nor on the number of
    devices, bit for bit on one kind of device. apply returns a tuple of arrays (N, ...); mesh: its
    devices share the work.
    """

    def __init__(self, apply, mesh, *, per_device):
        self._batch = sharding.of_batch(mesh)
        self._size = per_device * sharding.batch_shards(mesh)
        self._apply = jax.jit(apply, in_shardings=(None, self._batch), out_shardings=self._batch)

    def __call__(self, params, images, *, progress=False):
        """The outputs of apply as NumPy arrays (N, ...); progress: shows a bar on a terminal."""
        parts = []
        with tqdm(total=len(images), unit="image", disable=None if progress else True) as bar:
            for start in range(0, len(images), self._size):
                chunk = images[start : start + self._size]
                padded = np.resize(chunk, (self._size, *chunk.shape[1:]))
                out = self._apply(params, sharding.to_global(padded, self._batch))
                parts.append(jax.tree.map(sharding.to_host, out))
                bar.update(len(chunk))
        return jax.tree.map(lambda *each: np.concatenate(each)[: len(images)], *parts)


def check(images, shape):
    """The images as NumPy; UserError unless they are uint8 (N, *shape) and at least one.

    shape: (H, W, C), where a text such as "H" stands for any extent.
    """
    images = np.asarray(images)
    fits = images.ndim == 4 and all(
        isinstance(wanted, str) or extent == wanted
        for extent, wanted in zip(images.shape[1:], shape, strict=True)
    )
    if images.dtype != np.uint8 or not fits:
        wanted = ", ".join(map(str, shape))
        raise UserError(f"images must be uint8 (N, {wanted}), got {images.dtype} {images.shape}")
    if not len(images):
        raise UserError("images must be at least 1, got 0")
    return images
