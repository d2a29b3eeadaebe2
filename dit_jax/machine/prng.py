"""Keys of random numbers, all of one kind, whatever jax's environment says.

Without a kind, a key is of the kind that JAX_DEFAULT_PRNG_IMPL names. Only this module makes keys,
so that a seed gives the same numbers everywhere. Whoever draws from a key states the dtype: the
default is of 64 bits with JAX_ENABLE_X64, and other bits are other numbers.
"""

import numbers

import jax
import numpy as np

from dit_jax import compat

KIND = compat.partitionable_threefry()


def key(seed):
    """The key of a seed in 0 .. 2**32 - 1, which may be traced if it is uint32."""
    return jax.random.key(
        np.uint32(seed) if isinstance(seed, numbers.Integral) else seed, impl=KIND
    )


def wrap(data):
    """The keys whose jax.random.key_data is data, uint32 (..., 2)."""
    return jax.random.wrap_key_data(data, impl=KIND)
