"""Loads a random-access source as global batches on the devices.

Batch k depends on (seed, k) only. So the loader has no state to save: a run that resumes at step k
sees exactly the batches of a run that was never interrupted.
"""

import os
from typing import NamedTuple

import grain
import jax
import numpy as np

from dit_jax.errors import UserError
from dit_jax.machine import devices
from dit_jax.machine import sharding as sharding_lib

EPOCHS = 2**31  # more than any run needs; grain's endless repeat overflows at batch size 1


def batches(source, *, batch_size, seed, start, sharding, augment=None):
    """Yields {name: global array (batch_size, ...)} for the steps start, start + 1, ...

    Every epoch has a new random order, and a batch may span two epochs. Each process loads its rows
    of every batch in threads, a few batches ahead. augment(example, rng) -> example; its random
    generator depends only on the seed and on the example's index in the shuffled, repeated data.
    """
    rows = sharding_lib.local_rows(sharding, batch_size)
    local = part(source, batch_size=batch_size, seed=seed, start=start, augment=augment, rows=rows)

    def to_global(x):
        return sharding_lib.from_local_rows(np.asarray(x), rows, batch_size, sharding)

    options = _read_options(len(rows) * example_bytes(source, augment))
    for batch in local.to_iter_dataset(options):
        yield jax.tree.map(to_global, batch)


def _read_options(batch_bytes):
    ahead = num_ahead(batch_bytes)
    return grain.ReadOptions(num_threads=min(_threads(), ahead), prefetch_buffer_size=ahead)


def _threads():
    return max(2, os.cpu_count() or 1)


def num_ahead(batch_bytes):
    """How many batches to load ahead: two per core, but at most a quarter of the host's memory."""
    return max(1, min(2 * _threads(), devices.host_memory() // 4 // batch_bytes))


def example_bytes(source, augment):
    """The bytes that an example takes in a batch."""
    example = source[0]
    if augment:
        example = augment(example, np.random.default_rng(0))
    return sum(np.asarray(x).nbytes for x in example.values())


def check_fits(source, *, augment, num_rows):
    """UserError if num_rows examples, a batch or this process's share, are too large for a host.

    The loader holds at least two batches, and one more is on its way to the devices.
    """
    needed, memory = 3 * num_rows * example_bytes(source, augment), devices.host_memory()
    if needed > memory:
        raise UserError(
            f"train.batch_size must fit into the memory of a host, {memory / 1e9:.3g} GB, got "
            f"{num_rows} examples on a host, which take {needed / 1e9:.3g} GB"
        )


def part(source, *, batch_size, seed, start, augment, rows):
    """The given rows of every batch from `start` on: a grain MapDataset of NumPy batches.

    Row i of batch k is the same example with the same augmentation, whatever the other rows are.
    """
    dataset = grain.MapDataset.source(source).seed(seed).shuffle().repeat(EPOCHS)
    if augment:  # before the rows are selected, so that its randomness does not depend on them
        dataset = dataset.random_map(augment)
    selected = grain.MapDataset.source(_Rows(dataset, batch_size, rows))
    return selected.batch(len(rows))[start:]


class _Rows(NamedTuple):
    """Item i is the i-th of the given rows, counted across all batches."""

    dataset: grain.MapDataset
    batch_size: int
    rows: list[int]

    def __len__(self):
        return len(self.dataset) // self.batch_size * len(self.rows)

    def __getitem__(self, index):
        batch, row = divmod(index, len(self.rows))
        return self.dataset[batch * self.batch_size + self.rows[row]]
