"""Opens images that dit-prepare or tensorflow-datasets wrote, as a random-access source."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from dit_jax.data import arrayrecord, fields, images, prepare
from dit_jax.errors import UserError

MOST_DECODED = 2**28  # bytes of a split whose images are decoded once and stay in memory


class Images(NamedTuple):
    """Example i: {"image": uint8 (size, size, 3), ADM's centre crop, "label": int32}."""

    path: Path
    records: Any  # sequence of {"image": bytes, "label": int}
    size: int  # of the crop, in pixels
    class_names: tuple[str, ...]  # the name of label i
    short_sides: dict[int, int]  # {pixels: number of images}; {} if unavailable
    sha256: str | None  # of the content, from the digests of the shards; None if unavailable
    decoded: dict[int, dict] | None  # the examples read so far; None: they are too many to keep

    @property
    def num_classes(self):
        return len(self.class_names)

    def __len__(self):
        return len(self.records)

    def __getitem__(self, index):
        index = int(index)
        example = self.decoded.get(index) if self.decoded is not None else None
        if example is None:
            example = self._read(index)
            if self.decoded is not None:
                self.decoded[index] = example
        return dict(example)

    def _read(self, index):
        record = arrayrecord.read_record(self.records, index, self.path)
        try:
            image = images.center_crop(images.decode(record["image"]), self.size)
        except ValueError as error:
            raise UserError(
                f"example {index} of {self.path}: {error}; dit-prepare skips such files"
            ) from error
        return {"image": image, "label": np.int32(record["label"])}


def open_images(path, split, size):
    """The Images of a split; UserError unless `tfds.builder_from_directory` opens the directory."""
    import tensorflow_datasets as tfds

    path = Path(path)
    try:
        builder = tfds.builder_from_directory(path)
    except Exception as error:  # it raises several types, with pages of text
        raise UserError(
            f"dataset must be a directory written by dit-prepare or tensorflow-datasets, got {path}"
        ) from error
    _check_format(path, builder)
    fields.check_split(split, list(builder.info.splits))
    manifest = prepare.read_manifest(path)["splits"].get(split, {"shards": {}, "short_sides": {}})
    shards = manifest["shards"]
    arrayrecord.check_files(path, shards)
    sides = {int(side): count for side, count in manifest["short_sides"].items()}
    records = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
    class_names = tuple(builder.info.features["label"].names)
    sha256 = arrayrecord.content_sha256(shards) if shards else None
    decoded = {} if len(records) * size * size * 3 <= MOST_DECODED else None
    return Images(path, records, size, class_names, sides, sha256, decoded)


def _check_format(path, builder):
    """UserError if the builder's files cannot be read at random, or have no images or labels."""
    import tensorflow_datasets as tfds

    kind = builder.info.file_format.value
    if kind != "array_record":
        raise UserError(
            f"dataset must be stored as array_record, got {kind} in {path}: build it again with "
            "file_format='array_record', or run `tfds convert_format`"
        )
    features = builder.info.features
    for name, wanted in (("image", tfds.features.Image), ("label", tfds.features.ClassLabel)):
        got = features[name] if name in features else None
        if not isinstance(got, wanted):
            found = type(got).__name__ if got else f"only {', '.join(features)}"
            raise UserError(
                f"dataset must have a feature {name} of the type {wanted.__name__}, "
                f"got {found} in {path}"
            )


def warn_of_small(source):
    """Logs how many of the Images are smaller than their crop."""
    sides, size = source.short_sides, source.size
    if few := sum(count for side, count in sides.items() if side < size):
        message = (
            "%d of %d images are smaller than the %d-pixel crop and are enlarged (smallest: %d)"
        )
        logging.warning(message, few, len(source), size, min(sides))


def flip_at_random(example, rng):
    """Mirrors the image (H, W, C) of an example with probability 1/2."""
    if rng.random() < 0.5:
        return example | {"image": images.flip(example["image"])}
    return example
