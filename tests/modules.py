"""NumPy references for the layers of a DiT, in float64."""

import jax
import numpy as np
from flax import nnx


def normal(seed, shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def apply_linear(linear, x):
    """Of several joined linears, one after the other."""
    kernel = np.asarray(linear.kernel[...])
    return np.float64(x) @ kernel.reshape(len(kernel), -1) + np.ravel(linear.bias[...])


def with_bias(module):
    """The module, its biases no longer 0."""
    state = nnx.to_pure_dict(nnx.state(module, nnx.Param))
    state = jax.tree.map(lambda x: x + 0.1 * normal(x.size, x.shape), state)
    return nnx.merge(nnx.graphdef(module), state)
