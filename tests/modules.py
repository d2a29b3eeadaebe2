"""NumPy references for the layers of a DiT, in float64, and the arithmetic of a program."""

import math
import re

import jax
import numpy as np
from flax import nnx


def normal(seed, shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


DOT = re.compile(  # result, left operand and its contracted axes, in the text of a CPU's program
    r"= \w+\[([\d,]*)\]\S* dot\(%?([\w.-]+),.*lhs_contracting_dims=\{([\d,]*)\}"
)


def count_compiled_products(text):
    """Multiply-adds of the products in a compiled program without loops, from its text."""
    shapes = {x[1]: _numbers(x[2]) for x in re.finditer(r"%?([\w.-]+) = \w+\[([\d,]*)\]", text)}
    total = 0
    for out, left, contracted in DOT.findall(text):
        shape = shapes[left]
        total += math.prod(_numbers(out)) * math.prod(shape[axis] for axis in _numbers(contracted))
    return total


def _numbers(text):
    return [int(number) for number in text.split(",") if number]


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
