"""Numbers do not change with the settings of jax that a shell or a cluster's image carries.

JAX_DEFAULT_MATMUL_PRECISION is not among them: it is there to change how products are rounded.
"""

import functools
import hashlib
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax import settings as settings_lib
from dit_jax.checkpoint import digests
from dit_jax.machine import prng, sharding
from dit_jax.models import dit, vae
from dit_jax.runs import build
from dit_jax.sampling import autoencoder, generate, trained

SIZE = (2, 16, 2)  # depth, hidden size, heads
CONFIG = {
    "model": {
        **{"size": "Xs", "patch_size": 4, "input_size": [8, 8], "in_channels": 1},
        "num_classes": 10,
    },
    "compute": {"dtype": "float32"},
    "data": {"source": "digits", "space": "pixels"},
    "train": {
        **{"batch_size": 8, "warmup_steps": 2, "decay_steps": 9},
        **{"ema_warmup": True, "weight_decay": 0.1},
    },
    "sampling": {"num_steps": "4", "clip_x0": True, "cfg_scale": 2.0, "cfg_channels": 0},
}
VAE = vae.VAEConfig(latent_channels=1, channels=(8,), num_resnets=1, num_groups=4)
VARIABLES = {
    "JAX_ENABLE_X64": "1",
    "JAX_DEFAULT_PRNG_IMPL": "rbg",
    "JAX_THREEFRY_PARTITIONABLE": "0",
    "JAX_NUMPY_DTYPE_PROMOTION": "strict",
    "JAX_NUMPY_RANK_PROMOTION": "raise",
}


class Parts:
    """What people compute with, small."""

    def __init__(self):
        dit.SIZES["Xs"] = SIZE
        settings = settings_lib.read(CONFIG)
        self.parts = parts = build.parts(settings)
        self.state = jax.device_get(parts.create_state(prng.key(3)))
        rng = np.random.default_rng(0)
        self.labels = rng.integers(0, 10, 8).astype(np.int32)
        self.images = rng.integers(0, 256, (8, 8, 8, 1)).astype(np.uint8)
        self.posterior = np.float32(rng.standard_normal((8, 8, 8, 2)))
        self.photos = rng.integers(0, 256, (2, 8, 8, 3)).astype(np.uint8)
        apply, mesh = dit.make_apply(parts.model), sharding.make_mesh(devices=jax.devices()[:1])
        self.params = jax.tree.map(lambda x: x + np.float32(0.01), self.state.ema)
        self.model = trained.LoadedDiT(
            parts.model, self.params, apply, settings, mesh, step=0, weights="ema"
        )
        shapes = jax.eval_shape(lambda: vae.init(VAE, prng.key(0)))
        params = jax.tree.map(lambda x: 0.1 * rng.standard_normal(x.shape, np.float32), shapes)
        self.vae = autoencoder.Autoencoder(VAE, params, mesh)


def compute():
    """{what: digest of its bytes} of training, sampling and encoding."""
    p = Parts()
    results = {"init": p.state}
    step, state = p.parts.jit_step(), p.state
    key = jax.random.split(prng.key(2**32 - 1))[1]
    results["keys"] = jax.random.key_data(key)
    for _ in range(2):
        state, metrics = step(state, {"posterior": p.posterior, "label": p.labels}, key)
        results[f"step {state.step}"] = jax.device_get((state, metrics))
    results["digest"] = np.array(digests.of_tree(p.posterior)[""])
    results["samples"] = p.model.sample(np.full((2, 10), 0.1), seed=7, trajectory=True)
    results["call"] = p.model(np.ones((2, 8, 8, 1)), 0.5, [3, 10])
    results["encoded"] = moments = p.vae.encode(p.photos)
    results["decoded"] = p.vae.decode(moments[..., :1])
    results = {name: digest(x) for name, x in results.items()}
    if not jax.config.jax_enable_x64:  # 32 bits are the most that jax has
        return results
    return results | {"64 bits": sorted({str(eqn) for jaxpr in traces(p) for eqn in wide(jaxpr)})}


def digest(tree):
    sha256 = hashlib.sha256()
    for x in map(np.asarray, jax.tree.leaves(tree)):
        sha256.update(f"{x.dtype} {x.shape}".encode() + x.tobytes())
    return sha256.hexdigest()


def traces(p):
    """The jaxprs of what is compiled."""
    given = {"labels": p.labels, "key_data": np.zeros((8, 2), np.uint32)}
    weights = np.full((8, 11), 0.1, np.float32)
    batch = {"image": p.images, "label": p.labels}
    for function, *arguments in (
        (p.parts.train_step, p.state, batch, prng.key(0)),
        (p.parts.generate, p.params, given),
        (p.parts.generate, p.params, given | {"labels": weights}),
        (p.parts.init, prng.key(0)),
        (functools.partial(generate.image_keys, count=3), np.uint32(0)),
        (p.model, jnp.ones((2, 8, 8, 1)), jnp.ones(2), jnp.ones(2, int)),
        (lambda x: p.vae.encode_batch({"image": x, "label": x}), p.photos),
        (p.vae.jit_decode, p.vae.params, np.zeros((2, 8, 8, 1), np.float32)),
        (digests._sums, p.posterior),
    ):
        yield jax.make_jaxpr(function)(*arguments).jaxpr


def wide(jaxpr):
    """The equations of a jaxpr, and of those in it, whose results have 64 bits."""
    for equation in jaxpr.eqns:
        if any(x.aval.dtype in (np.int64, np.uint64, np.float64) for x in equation.outvars):
            yield equation
        parameters = list(equation.params.values())
        for inner in jax.tree.leaves(parameters, is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from wide(inner)


def run(variables):
    """The results of `compute` in another process with these variables."""
    environment = {name: x for name, x in os.environ.items() if name not in VARIABLES}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path)} | variables
    command = [sys.executable, __file__]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def plain():
    """The results without variables; the processes after it find its programs in the cache."""
    return run({})


def test_no_variable_of_jax_changes_a_bit_of_training_sampling_and_encoding(plain):
    changed = run(VARIABLES)
    assert changed.pop("64 bits") == []
    assert changed == plain


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, value", [*VARIABLES.items(), ("JAX_DEFAULT_PRNG_IMPL", "unsafe_rbg")]
)
def test_a_single_variable_of_jax_changes_no_bit(plain, name, value):
    changed = run({name: value})
    assert changed.pop("64 bits", []) == []
    assert changed == plain


if __name__ == "__main__":
    print(json.dumps(compute()))
