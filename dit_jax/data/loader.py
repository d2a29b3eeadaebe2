"""From a random-access source to global batches on the devices: batch k is a function of (seed, k).

The loader's whole state is the step, so a run resumes at any step with exactly the batches that it
would have seen.
"""

import os
from typing import NamedTuple

import grain
import jax
import numpy as np

from dit_jax.machine import sharding as sharding_lib

EPOCHS = 2**31  # more than any run has; grain's own "endless" overflows in batches of one example


def batches(source, *, batch_size, seed, start, sharding, augment=None):
    """Iterates over {name: global array (batch_size, ...)} of the steps start, start + 1, ...

    Every epoch is shuffled anew, and a batch may span two. Each process loads its own part of
    every batch, a few batches ahead, in threads. augment(example, rng) -> example changes an
    example with a generator of its own, a function of (seed, place in the order) alone.
    """
    rows = sharding_lib.local_rows(sharding, batch_size)
    share = part(source, batch_size=batch_size, seed=seed, start=start, augment=augment, rows=rows)

    def place(x):
        return sharding_lib.from_local_rows(np.asarray(x), rows, batch_size, sharding)

    threads = max(2, os.cpu_count() or 1)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    for batch in share.to_iter_dataset(options):
        yield jax.tree.map(place, batch)


def part(source, *, batch_size, seed, start, augment, rows):
    """Some rows of every batch from `start` on, a grain MapDataset of NumPy arrays.

    Row i of batch k is the same example, augmented in the same way, whatever the other rows are.
    """
    dataset = grain.MapDataset.source(source).seed(seed).shuffle().repeat(EPOCHS)
    if augment:  # before rows are taken, so that each example keeps its draw
        dataset = dataset.random_map(augment)
    taken = grain.MapDataset.source(_Rows(dataset, batch_size, rows))
    return taken.batch(len(rows))[start:]


class _Rows(NamedTuple):
    """Example i is the next one, batch by batch, of the rows."""

    dataset: grain.MapDataset
    batch_size: int
    rows: list[int]

    def __len__(self):
        return len(self.dataset) // self.batch_size * len(self.rows)

    def __getitem__(self, index):
        batch, row = divmod(index, len(self.rows))
        return self.dataset[batch * self.batch_size + self.rows[row]]
