"""A prepared dataset of images, read at random: of dit-prepare, or any of tensorflow-datasets.

Shapes: H W size of the crop. Images are uint8 (H, W, 3).
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from dit_jax.data import images, shards


class Images(NamedTuple):
    """Example i: {"image": uint8 (size, size, 3), ADM's centre crop, "label": int32}."""

    records: Any  # sequence of {"image": bytes, "label": int}
    size: int
    num_classes: int

    def __len__(self):
        return len(self.records)

    def __getitem__(self, index):
        record = self.records[int(index)]
        try:
            image = images.center_crop(images.decode(record["image"]), self.size)
        except ValueError as error:
            raise ValueError(
                f"example {index} of data.path: {error}; dit-prepare leaves such files out"
            ) from error
        return {"image": image, "label": np.int32(record["label"])}


def open_images(path, split, size):
    """The Images of a split in a directory that `tfds.builder_from_directory` opens."""
    import tensorflow_datasets as tfds

    path = Path(path)
    try:
        builder = tfds.builder_from_directory(path)
    except Exception as error:  # it raises several types, with pages of text
        raise ValueError(
            f"data.path must be a directory of dit-prepare or tensorflow-datasets, got {path}"
        ) from error
    splits = list(builder.info.splits)
    if split not in splits:
        raise ValueError(f"data.split must be one of {', '.join(splits)}, got {split!r}")
    prepared = shards.read_manifest(path)["splits"]
    if split in prepared:
        shards.check_files(path, prepared[split]["shards"])
        _warn_of_small(prepared[split], size)
    records = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
    return Images(records, size, builder.info.features["label"].num_classes)


def _warn_of_small(known, size):
    """Says how many images of a prepared split are smaller than their crop."""
    sides = {int(side): count for side, count in known["short_sides"].items()}
    if few := sum(count for side, count in sides.items() if side < size):
        total, least = known["num_examples"], min(sides)
        message = "%d of %d images are smaller than the crop of %d (the least %d) and are enlarged"
        logging.warning(message, few, total, size, least)


def flip_at_random(example, rng):
    """The example, left and right exchanged or not, one as likely as the other."""
    if rng.random() < 0.5:
        return example | {"image": images.flip(example["image"])}
    return example
