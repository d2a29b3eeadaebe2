"""Mean and covariance of features, from a stream of batches, in float64.

Results do not depend on the batch size, bit for bit: rows are divided into blocks of a fixed size,
which are merged in their order. Shapes: N rows, D features.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from dit_jax.errors import UserError

BLOCK = 1024  # rows


class Moments(NamedTuple):
    """Of N rows, float64. Sums of squares would lose digits where a mean is large."""

    count: int
    mean: np.ndarray  # (D,)
    scatter: np.ndarray  # (D, D): sum of the outer products of the rows less their mean

    def covariance(self):
        """The unbiased estimate (D, D), as np.cov's."""
        if self.count < 2:
            raise UserError(f"a covariance needs at least 2 samples, got {self.count}")
        return self.scatter / (self.count - 1)


def of_batches(batches: Iterable[np.ndarray]):
    """Moments of all rows of batches (n, D), which may have different n."""
    total = None
    for block in in_blocks(batches, BLOCK):
        x = np.asarray(block, np.float64)
        mean = x.mean(axis=0)
        x = x - mean
        moments = Moments(len(x), mean, x.T @ x)
        total = moments if total is None else merge(total, moments)
    if total is None:
        raise UserError("moments need at least 1 sample, got 0")
    return total


def of(features):
    """Moments of features (N, D)."""
    return of_batches([features])


def merge(a, b):
    """Moments of the rows of both (Chan, Golub & LeVeque 1983)."""
    count = a.count + b.count
    difference = b.mean - a.mean
    between = np.outer(difference, difference) * (a.count * b.count / count)
    mean = a.mean + difference * (b.count / count)
    return Moments(count, mean, a.scatter + b.scatter + between)


def in_blocks(batches, size):
    """Yields all rows of the batches in their order, `size` at a time; the last block may be
    smaller."""
    waiting, count = [], 0
    for batch in batches:
        while len(batch):
            part, batch = batch[: size - count], batch[size - count :]
            waiting.append(part)
            count += len(part)
            if count == size:
                yield np.concatenate(waiting)
                waiting, count = [], 0
    if waiting:
        yield np.concatenate(waiting)
