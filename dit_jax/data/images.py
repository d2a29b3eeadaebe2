"""Images of any file, as the network wants them: decoded to RGB, cropped as ADM does, flipped.

Shapes: H W grid. Images are uint8 (H, W, 3).
"""

import io
import re

import numpy as np
from PIL import Image, ImageOps

from dit_jax.errors import UserError

Image.MAX_IMAGE_PIXELS = None  # a large image of one's own is no attack
WIDE = ("I", "I;16", "I;16B", "I;16L", "I;16N")  # modes with 16 bits of grey


def decode(data):
    """The RGB PIL image in the bytes of a file; UserError where it is none or is damaged.

    Upright by its EXIF orientation; what is transparent lies on white; 16 bits become 8.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            return to_rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # Pillow raises half a dozen types for a broken file
        text = re.sub(r" <_io\.BytesIO object at \w+>", "", str(error))  # never twice the same
        reason = " ".join(text.split())[:100] or type(error).__name__
        raise UserError(f"image must be a whole image file: {reason}") from error


def to_rgb(image):
    """A PIL image of any mode in RGB."""
    if image.mode in WIDE:
        wide = np.asarray(image).astype(np.int64)
        image = Image.fromarray((wide.clip(0, 65535) // 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def center_crop(image, size):
    """The middle square of a PIL image, `size` pixels wide: uint8 (size, size, 3).

    As ADM (guided-diffusion, image_datasets.py): halved by a box filter while its short side is at
    least twice the size, then bicubic to the size, then cut.
    """
    while min(image.size) >= 2 * size:
        image = image.resize(tuple(x // 2 for x in image.size), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize(tuple(round(x * scale) for x in image.size), Image.Resampling.BICUBIC)
    left, top = ((x - size) // 2 for x in image.size)
    return np.asarray(image.crop((left, top, left + size, top + size)))


def flip(image):
    """Left and right exchanged. (..., H, W, C)."""
    return image[..., ::-1, :]
