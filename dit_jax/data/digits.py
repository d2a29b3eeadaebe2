"""The digits of scikit-learn: 1,797 scanned 8x8 digits in 10 classes, in a fixed random split."""

from typing import NamedTuple

import numpy as np

NUM_TRAIN = 1500
NUM_CLASSES = 10


class Digits(NamedTuple):
    """Example i: {"image": uint8 (8, 8, 1), "label": int32}."""

    image: np.ndarray  # (N, 8, 8, 1)
    label: np.ndarray  # (N,)

    def __len__(self):
        return len(self.label)

    def __getitem__(self, index):
        return {"image": self.image[index], "label": self.label[index]}


def load():
    """(train, held_out): always the same 1,500 and 297 digits.

    The split is random because the last digits of the file come from other writers than the first.
    """
    from sklearn import datasets  # here, since it takes a second and only this data set needs it

    pixels, label = datasets.load_digits(return_X_y=True)  # (1797, 64) in 0 .. 16
    image = np.rint(pixels * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
    order = np.random.default_rng(0).permutation(len(label))
    parts = np.split(order, [NUM_TRAIN])
    return tuple(Digits(image[part], label[part].astype(np.int32)) for part in parts)
