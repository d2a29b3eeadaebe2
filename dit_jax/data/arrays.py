"""Labelled images in memory, as arrays: the source of small data sets."""

import hashlib
from typing import NamedTuple

import numpy as np


class Arrays(NamedTuple):
    """Example i: {"image": uint8 (H, W, C), "label": int32}."""

    image: np.ndarray  # (N, H, W, C)
    label: np.ndarray  # (N,)
    class_names: tuple[str, ...]  # the name of label i

    def __len__(self):
        return len(self.label)

    def __getitem__(self, index):
        return {"image": self.image[index], "label": self.label[index]}

    @property
    def sha256(self):
        """A hex digest of the images and their labels."""
        digest = hashlib.sha256(repr(self.image.shape).encode() + self.image.tobytes())
        digest.update(self.label.tobytes())
        return digest.hexdigest()
