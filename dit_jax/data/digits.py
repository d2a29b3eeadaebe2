"""The digits of scikit-learn: 1,797 scanned 8x8 digits in 10 classes, in a fixed random split."""

import importlib.util
from pathlib import Path

import numpy as np

from dit_jax.data.arrays import Arrays

NUM_TRAIN = 1500
NUM_CLASSES = 10


def load(classes=()):
    """(train, held_out): always the same 1,500 and 297 digits, or those of some classes, as Arrays.

    classes: digits, which become the labels 0, 1, ... in this order; (): all of them. The split is
    random because the last digits of the file come from other writers than the first.
    """
    # sklearn.datasets.load_digits reads the same file, but it takes a second to import sklearn.
    package = Path(importlib.util.find_spec("sklearn").origin).parent
    rows = np.loadtxt(package / "datasets/data/digits.csv.gz", delimiter=",")
    pixels, label = np.split(rows, [64], axis=1)  # (1797, 64) in 0 .. 16, (1797, 1)
    image = np.rint(pixels * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
    label = label[:, 0].astype(np.int32)
    order = np.random.default_rng(0).permutation(len(label))
    parts = np.split(order, [NUM_TRAIN])
    names = tuple(str(digit) for digit in range(NUM_CLASSES))
    splits = (Arrays(image[part], label[part], names) for part in parts)
    return tuple(_select(split, classes) if classes else split for split in splits)


def _select(split, classes):
    """The examples of these classes, with new labels."""
    chosen = np.isin(split.label, classes)
    labels = np.zeros(NUM_CLASSES, np.int32)
    labels[list(classes)] = np.arange(len(classes))
    names = tuple(split.class_names[digit] for digit in classes)
    return Arrays(split.image[chosen], labels[split.label[chosen]], names)
