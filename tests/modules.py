"""NumPy references for the layers of a DiT, in float64, and the arithmetic of a program."""

import math

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


def count_products(jaxpr):
    """Multiply-adds of a jaxpr's dot_generals: of all runs of a loop, of the largest branch."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += math.prod(equation.outvars[0].aval.shape) * math.prod(
                shape[axis] for axis in contracted
            )
        found = [getattr(x, "jaxpr", x) for x in jax.tree.leaves(list(equation.params.values()))]
        inner = [count_products(each) for each in found if hasattr(each, "eqns")]
        if equation.primitive.name == "cond":
            inner = [max(inner)]
        total += sum(inner) * equation.params.get("length", 1)  # of a scan
    return total
