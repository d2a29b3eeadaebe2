"""From a random-access source to global batches on the devices: batch k is a function of (seed, k).

The loader's whole state is the step, so a run resumes at any step with exactly the batches that it
would have seen.
"""

import grain
import jax
import numpy as np


def batches(source, *, batch_size, seed, start, sharding):
    """Iterates over {name: global array (batch_size, ...)} of the steps start, start + 1, ...

    Every epoch is shuffled anew, and a batch may span two. Each process loads its own part of
    every batch, a few batches ahead, in threads.
    """
    per_process = batch_size // jax.process_count()
    dataset = grain.MapDataset.source(source).seed(seed).shuffle().repeat().batch(per_process)
    mine = dataset[start * jax.process_count() + jax.process_index() :: jax.process_count()]
    for batch in mine.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)):
        yield jax.tree.map(lambda x: _to_global(np.asarray(x), sharding), batch)


def _to_global(x, sharding):
    return jax.make_array_from_process_local_data(sharding, x)
