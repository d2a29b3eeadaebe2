"""Fashion-MNIST (Xiao et al. 2017, arXiv:1708.07747): 28x28 grey pictures of clothes, 10 classes.

It comes as four IDX files, gzipped or not: 60,000 pictures to train on and 10,000 to test with,
each with their labels. Debian's package dataset-fashion-mnist puts them into
/usr/share/datasets/fashion-mnist; launch/fashion.sh downloads them.
"""

import gzip
import math
import zlib
from pathlib import Path

import numpy as np

from dit_jax.data.arrays import Arrays
from dit_jax.errors import UserError

CLASS_NAMES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
SPLITS = {"train": "train", "test": "t10k"}  # the first word of their files
UINT8 = 0x08  # the only type of IDX that is read


def load(folder, split):
    """The Arrays of a split, "train" or "test"; UserError if its two files are missing or wrong."""
    if split not in SPLITS:
        raise UserError(f"data.split must be one of {', '.join(SPLITS)}, got {split!r}")
    images = _find(folder, f"{SPLITS[split]}-images-idx3-ubyte")
    labels = _find(folder, f"{SPLITS[split]}-labels-idx1-ubyte")
    image, label = read_idx(images, num_axes=3), read_idx(labels, num_axes=1)
    if len(image) != len(label):
        raise UserError(
            f"{labels} must have a label for each of {len(image)} images, got {label.size}"
        )
    if label.max(initial=0) >= len(CLASS_NAMES):
        raise UserError(
            f"{labels} must have labels in 0 .. {len(CLASS_NAMES) - 1}, got {label.max()}"
        )
    return Arrays(image[..., None], label.astype(np.int32), CLASS_NAMES)


def _find(folder, name):
    """The path of an IDX file, with .gz or without."""
    folder = Path(folder).expanduser()
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise UserError(
        f"data.path must be a folder with the IDX files of Fashion-MNIST, got {folder} without "
        f"{name}.gz: launch/fashion.sh downloads them"
    )


def read_idx(path, *, num_axes):
    """The uint8 array in an IDX file, gzipped if its name ends with .gz; UserError if it is wrong.

    An IDX file is two zero bytes, the type, the number of axes, the extent of each axis as a
    big-endian 32-bit number, and the values.
    """
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path} must be a whole gzip file: {error}; download it again") from error
    start = 4 + 4 * num_axes
    if data[:4] != bytes([0, 0, UINT8, num_axes]) or len(data) < start:
        raise UserError(
            f"{path} must be an IDX file of bytes with {num_axes} axes, got one that begins with "
            f"{data[:4].hex(' ') or 'nothing'}"
        )
    shape = tuple(np.frombuffer(data, ">u4", num_axes, offset=4).tolist())
    if len(data) - start != math.prod(shape) or not math.prod(shape):
        size = " x ".join(map(str, shape))
        raise UserError(
            f"{path} must have {size} values, at least one, got {len(data) - start}: download it "
            "again"
        )
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)
