"""Digests of arrays, by which corruption is detected."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr

BLOCK = 2**16  # words at a time, so that they fit the cache of a core
SMALL = 2**20  # values, which the host sums up in less time than a program for them compiles


def of_tree(tree):
    """{path of a leaf: 16 hex digits}; they do not depend on the sharding.

    A digest is two sums modulo 2^32 of the leaf's words, each word times an odd number made from
    its index: a change of one bit always changes both.
    """
    # One leaf at a time: leaves of one shape share a program, only one is on a device, and CPU
    # processes with several sums in flight would deadlock.
    return {keystr(path): _of_leaf(x) for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def _of_leaf(x):
    if x.size <= SMALL and (isinstance(x, np.ndarray) or len(x.sharding.device_set) == 1):
        return of_array(np.asarray(x))
    return _show(np.asarray(_sums(x)))


def _show(sums):
    return "".join(f"{word:08x}" for word in sums)


def of_array(x):
    """The digest of one NumPy array."""
    words, sums = x.reshape(-1).view(f"uint{8 * x.dtype.itemsize}"), np.zeros(2, np.uint32)
    for start in range(0, words.size, BLOCK):
        block = words[start : start + BLOCK].astype(np.uint32)
        index = np.arange(start, start + block.size).astype(np.uint32)
        mixed = (index ^ (index >> 15)) * np.uint32(0x9E3779B1)
        factors = 2 * index + 1, mixed | np.uint32(1)
        sums += [(block * factor).sum(dtype=np.uint32) for factor in factors]
    return _show(sums)


@jax.jit
def _sums(x):
    words = x if x.dtype == jnp.uint32 else x.view(f"uint{8 * x.dtype.itemsize}")
    words = words.astype(jnp.uint32)
    index = jnp.zeros(x.shape, jnp.uint32)
    for axis, extent in enumerate(x.shape):
        step = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        index = index * jnp.uint32(extent) + step
    mixed = (index ^ (index >> 15)) * jnp.uint32(0x9E3779B1)
    terms = (words * (2 * index + 1), words * (mixed | jnp.uint32(1)))

    def add(a, b):
        return a[0] + b[0], a[1] + b[1]

    # XLA fuses one reduction of both sums with its terms. Two sums would store two arrays of the
    # leaf's size and take 20 times as long on a CPU.
    return jnp.stack(jax.lax.reduce(terms, (jnp.uint32(0),) * 2, add, range(x.ndim)))
