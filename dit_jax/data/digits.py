"""scikit-learn's digits: 1,797 scanned 8x8 digits of 10 classes, in the package, split in two."""

from typing import NamedTuple

import numpy as np
from sklearn.datasets import load_digits

NUM_TRAIN = 1500
NUM_CLASSES = 10


class Digits(NamedTuple):
    """image (N, 8, 8, 1) uint8; label (N,) int32. A random-access source of examples."""

    image: np.ndarray
    label: np.ndarray

    def __len__(self):
        return len(self.label)

    def __getitem__(self, index):
        return {"image": self.image[index], "label": self.label[index]}


def load():
    """(train, held_out): 1,500 and 297 digits, always the same, drawn at random.

    Random, since the file's last digits were written by other people than its first.
    """
    pixels, label = load_digits(return_X_y=True)  # (1797, 64) of 0 .. 16
    image = np.rint(pixels * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
    order = np.random.default_rng(0).permutation(len(label))
    parts = np.split(order, [NUM_TRAIN])
    return tuple(Digits(image[part], label[part].astype(np.int32)) for part in parts)
