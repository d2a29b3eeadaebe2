"""Pictures of uint8 images (N, H, W, C), C 1 or 3: a grid, or one PNG file each."""

import math

import numpy as np
from PIL import Image

GREY = 96  # of the lines between the images of a grid


def grid(images, *, columns=0, scale=1):
    """The images side by side, each pixel repeated `scale` times: a PIL image.

    columns 0 makes the grid about square. Grey lines of max(2, scale) pixels separate the images.
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
    return to_pil(canvas)


def grid_scale(size):
    """How often to repeat a pixel so that a tiny image is visible: 8 for (8, 8)."""
    return max(1, 64 // max(size))


def to_pil(image):
    """The PIL image of uint8 (H, W, C), C 1 or 3."""
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def write_all(images, folder):
    """Writes the images as 00000.png, 00001.png, ... of a new folder."""
    folder.mkdir()
    for i, image in enumerate(images):
        to_pil(image).save(folder / f"{i:05d}.png")
