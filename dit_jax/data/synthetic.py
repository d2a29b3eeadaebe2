"""Random latents and labels of any shape, to train for measuring and planning without data."""

from typing import NamedTuple

import numpy as np


class Synthetic(NamedTuple):
    """Example i is a pure function of i: image (H, W, C) float32 N(0, 1), label int32."""

    shape: tuple[int, int, int]
    num_classes: int
    num_examples: int = 10_000

    def __len__(self):
        return self.num_examples

    def __getitem__(self, index):
        rng = np.random.default_rng(index)
        image = rng.standard_normal(self.shape, dtype=np.float32)
        return {"image": image, "label": np.int32(rng.integers(self.num_classes))}
