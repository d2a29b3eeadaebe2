"""A small tree of arrays, and how to save it as a step."""

import jax
import jax.numpy as jnp

from dit_jax.checkpoint import store
from dit_jax.machine import sharding

META = {"config": {"seed": 3}}


def make_tree():
    key = jax.random.key(0)
    return {
        "kernel": jax.random.normal(key, (8, 16)),
        "half": jax.random.normal(key, (8,)).astype(jnp.bfloat16),
        "count": jnp.int32(7),
    }


def abstract(tree):
    place = sharding.replicated(sharding.make_mesh())
    return sharding.abstract(tree, jax.tree.map(lambda _: place, tree))


def save(directory, tree, steps=(5,)):
    with store.open_writer() as writer:
        for step in steps:
            store.save(writer, directory, step, {"params": tree, "ema": tree}, META)
