"""Writes the checkpoint of a run without training: a tiny DiT of digits with random weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.checkpoint import store
from dit_jax.models import dit

MODEL = {
    "size": "Ti",
    "patch_size": 4,
    "input_size": [8, 8],
    "in_channels": 1,
    "num_classes": 10,
    "null_label": True,
    "learn_sigma": True,
    "conditioning": "adaln_zero",
}
CONFIG = {
    "model": MODEL,
    "compute": {"dtype": "float32", "attention": "auto", "remat": "full", "unroll": False},
    "diffusion": {"schedule": "linear", "num_steps": 1000},
    "data": {"source": "digits", "space": "pixels"},
    "sampling": {
        "sampler": "ddim",
        "num_steps": "4",
        "eta": 0.0,
        "clip_x0": True,
        "cfg_scale": 2.0,
        "cfg_channels": 0,
        "cfg_interval": [0, 999],
    },
}


def save(path, config=CONFIG, step=30, model=None, **meta):
    """Writes one step to path/checkpoints and returns its parameters and EMA, which differ.

    model: a DiTConfig; None: that of MODEL. meta: more that the checkpoint remembers.
    """
    model = model or dit.configure(**MODEL)
    params, ema = draw(model)
    with store.open_writer(background=False) as writer:
        meta |= {"model": model._asdict(), "config": config}
        store.save(writer, path / "checkpoints", step, {"params": params, "ema": ema}, meta)
    return params, ema


@functools.cache
def draw(model):
    """Random parameters of a DiTConfig and their EMA."""
    params = weights(dit.init, model)
    return params, jax.tree.map(lambda x: 0.9 * x, params)


def weights(init, config):
    """Random float32 arrays of the shapes of init(config, key); NumPy draws without compiling."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: init(config, jax.random.key(0)))
    draw = rng.standard_normal
    return jax.tree.map(lambda x: jnp.asarray(0.07 * draw(x.shape, np.float32)), shapes)
