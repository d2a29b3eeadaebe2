"""From a random-access source to global batches on the devices: batch k is a function of (seed, k).

The loader's whole state is the step, so a run resumes at any step with exactly the batches that it
would have seen.
"""

import os

import grain
import jax
import numpy as np

EPOCHS = 2**31  # more than any run has; grain's own "endless" overflows in batches of one example


def batches(source, *, batch_size, seed, start, sharding, augment=None):
    """Iterates over {name: global array (batch_size, ...)} of the steps start, start + 1, ...

    Every epoch is shuffled anew, and a batch may span two. Each process loads its own part of
    every batch, a few batches ahead, in threads. augment(example, rng) -> example changes an
    example with a generator of its own, a function of (seed, place in the order) alone.
    """
    share = part(
        source,
        batch_size=batch_size,
        seed=seed,
        start=start,
        augment=augment,
        process=jax.process_index(),
        num_processes=jax.process_count(),
    )
    threads = max(2, os.cpu_count() or 1)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    for batch in share.to_iter_dataset(options):
        yield jax.tree.map(lambda x: _to_global(np.asarray(x), sharding), batch)


def part(source, *, batch_size, seed, start, augment, process, num_processes):
    """The batches of one of several processes, a grain MapDataset of NumPy arrays.

    Batch k of all of them, one after the other, is the same for any number of processes.
    """
    dataset = grain.MapDataset.source(source).seed(seed).shuffle().repeat(EPOCHS)
    if augment:  # before the processes part, so that each example keeps its draw
        dataset = dataset.random_map(augment)
    dataset = dataset.batch(batch_size // num_processes)
    return dataset[start * num_processes + process :: num_processes]


def _to_global(x, sharding):
    return jax.make_array_from_process_local_data(sharding, x)
