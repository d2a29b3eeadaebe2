"""Random latents and labels of any shape: for benchmarks and plans without data."""

from typing import NamedTuple

import numpy as np


class Synthetic(NamedTuple):
    """Example i: {"x0": float32 (H, W, C) ~ N(0, 1) in model units, "label": int32}.

    It depends on i only.
    """

    shape: tuple[int, int, int]
    num_classes: int
    num_examples: int = 10_000

    def __len__(self):
        return self.num_examples

    def __getitem__(self, index):
        rng = np.random.default_rng(index)
        x0 = rng.standard_normal(self.shape, dtype=np.float32)
        return {"x0": x0, "label": np.int32(rng.integers(self.num_classes))}
