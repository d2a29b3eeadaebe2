"""A prepared dataset of images, read at random: of dit-prepare, or any of tensorflow-datasets.

Shapes: H W size of the crop. Images are uint8 (H, W, 3).
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from dit_jax.data import images, shards
from dit_jax.errors import UserError


class Images(NamedTuple):
    """Example i: {"image": uint8 (size, size, 3), ADM's centre crop, "label": int32}."""

    path: Path
    records: Any  # sequence of {"image": bytes, "label": int}
    size: int
    num_classes: int
    short_sides: dict[int, int]  # how many images have a short side of so many pixels; or empty

    def __len__(self):
        return len(self.records)

    def __getitem__(self, index):
        record = shards.read_record(self.records, int(index), self.path)
        try:
            image = images.center_crop(images.decode(record["image"]), self.size)
        except ValueError as error:
            raise UserError(
                f"example {index} of {self.path}: {error}; dit-prepare leaves such files out"
            ) from error
        return {"image": image, "label": np.int32(record["label"])}


def open_images(path, split, size):
    """The Images of a split in a directory that `tfds.builder_from_directory` opens."""
    import tensorflow_datasets as tfds

    path = Path(path)
    try:
        builder = tfds.builder_from_directory(path)
    except Exception as error:  # it raises several types, with pages of text
        raise UserError(
            f"dataset must be a directory of dit-prepare or tensorflow-datasets, got {path}"
        ) from error
    splits = list(builder.info.splits)
    if split not in splits:
        raise UserError(f"split must be one of {', '.join(splits)}, got {split!r}")
    prepared = shards.read_manifest(path)["splits"].get(split, {"shards": {}, "short_sides": {}})
    shards.check_files(path, prepared["shards"])
    sides = {int(side): count for side, count in prepared["short_sides"].items()}
    records = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
    return Images(path, records, size, builder.info.features["label"].num_classes, sides)


def warn_of_small(source):
    """Says how many of the Images are smaller than their crop."""
    sides, size = source.short_sides, source.size
    if few := sum(count for side, count in sides.items() if side < size):
        message = "%d of %d images are smaller than the crop of %d (the least %d) and are enlarged"
        logging.warning(message, few, len(source), size, min(sides))


def flip_at_random(example, rng):
    """The example, left and right exchanged or not, one as likely as the other."""
    if rng.random() < 0.5:
        return example | {"image": images.flip(example["image"])}
    return example
