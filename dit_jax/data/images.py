"""Decodes image files to RGB, crops them like ADM, and flips them.

Shapes: H W image height and width. An `image` is uint8 (H, W, 3).
"""

import io
import re

import numpy as np
from PIL import ExifTags, Image

from dit_jax.errors import UserError

Image.MAX_IMAGE_PIXELS = None  # the user's own large images are not an attack
GREY_16_BIT = ("I;16", "I;16B", "I;16L", "I;16N")  # PIL modes
UPRIGHT = {  # what turns an image of an EXIF orientation upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode(data):
    """The RGB PIL image in the bytes of a file; UserError if they cannot be decoded.

    EXIF orientation is applied, transparent pixels are blended with white, 16 bits become 8.
    Damaged metadata is ignored. Floats and 32-bit integers are refused: their range is unknown.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            return to_rgb(_turn_upright(image))
    except UserError:
        raise
    except Exception as error:  # Pillow raises many types for a corrupt file
        text = re.sub(r" <_io\.BytesIO object at \w+>", "", str(error))  # differs from run to run
        reason = " ".join(text.split())[:100] or type(error).__name__
        # dit-prepare writes this message into manifest.json: its bytes are fixed.
        raise UserError(f"image must be a whole image file: {reason}") from error


def _turn_upright(image):
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # Pillow raises many types for damaged EXIF or XMP
        return image
    return image.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else image


def to_rgb(image):
    """Converts a PIL image of any mode with 8 or 16 bits per channel to RGB."""
    if image.mode in ("I", "F"):
        kind = "signed or 32-bit integers" if image.mode == "I" else "floats"
        raise UserError(f"image must have 8 or 16 bits without sign per channel, got {kind}")
    if image.mode in GREY_16_BIT:
        grey = np.asarray(image).astype(np.int64)
        image = Image.fromarray((grey.clip(0, 65535) // 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def center_crop(image, size):
    """The centre square of a PIL image, resized: uint8 (size, size, 3).

    As ADM (guided-diffusion, image_datasets.py): halve with a box filter while the short side is
    at least 2 * size, resize the short side to `size` (bicubic), then crop.
    """
    while min(image.size) >= 2 * size:
        image = image.resize(tuple(x // 2 for x in image.size), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize(tuple(round(x * scale) for x in image.size), Image.Resampling.BICUBIC)
    left, top = ((x - size) // 2 for x in image.size)
    return np.asarray(image.crop((left, top, left + size, top + size)))


def flip(image):
    """Mirrors left and right. (..., H, W, C)."""
    return image[..., ::-1, :]
