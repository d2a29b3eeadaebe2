"""Parameters that training leaves as they are, chosen by patterns of their paths.

A path looks like blocks/attn/qkv/kernel, as in `machine.sharding`. A pattern is a regular
expression that may match any part of it: "blocks/mlp", "^x_embedder", "bias$".
"""

import difflib
import re

import jax
import optax
from flax import traverse_util

from dit_jax.errors import UserError


def split(params, patterns):
    """(trained, frozen): two nested dicts that together have every parameter once."""
    trained, frozen = {}, {}
    for path, x in traverse_util.flatten_dict(params, sep="/").items():
        part = frozen if any(re.search(pattern, path) for pattern in patterns) else trained
        part[path] = x
    return tuple(traverse_util.unflatten_dict(part, sep="/") for part in (trained, frozen))


def merge(trained, frozen):
    """The parameters that `split` divided."""
    parts = (traverse_util.flatten_dict(part) for part in (trained, frozen))
    return traverse_util.unflatten_dict({path: x for part in parts for path, x in part.items()})


def leave_out(optimizer, patterns):
    """The optimizer without a state for frozen parameters; `update` gets the trained ones only."""

    def init(params):
        return optimizer.init(split(params, patterns)[0])

    return optax.GradientTransformation(init, optimizer.update)


def check(params, patterns):
    """UserError if a pattern matches no parameter, or if all parameters are frozen."""
    paths = list(traverse_util.flatten_dict(params, sep="/"))
    for pattern in patterns:
        if not any(re.search(pattern, path) for path in paths):
            near = difflib.get_close_matches(pattern, _prefixes(paths), 3, cutoff=0)
            raise UserError(
                f"train.frozen must match parameters, got {pattern!r}, which matches none; "
                f"the nearest are {', '.join(near)}"
            )
    if not split(params, patterns)[0]:
        raise UserError(f"train.frozen must leave a parameter to train, got {tuple(patterns)}")


def _prefixes(paths):
    """Every path and every folder of a path, once each."""
    words = [path.split("/") for path in paths]
    return sorted({"/".join(each[:count]) for each in words for count in range(1, len(each) + 1)})


def describe(params, patterns):
    """How many parameters are frozen, and their paths, as one line of text."""
    frozen = traverse_util.flatten_dict(split(params, patterns)[1], sep="/")
    count, total = (sum(x.size for x in jax.tree.leaves(tree)) for tree in (frozen, params))
    return f"{count:,} of {total:,} parameters are frozen: {', '.join(frozen)}"
