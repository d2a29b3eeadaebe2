"""Muon, clipping and averages train the same on every mesh, and their state is saved."""

import functools

import jax
import numpy as np
import optax
import pytest
from flax import traverse_util

from dit_jax.checkpoint import store
from dit_jax.diffusion import ddpm, schedules
from dit_jax.machine import sharding
from dit_jax.models import dit
from dit_jax.train import optimizer, power_ema
from dit_jax.train import state as states
from dit_jax.train import step as steps

CONFIG = dit.DiTConfig((4, 4), 1, 1, 3, 16, 2, 10, True, True, "adaln_zero")
MUON = optimizer.make(
    "muon",
    **{"learning_rate": 0.01, "b1": 0.9, "b2": 0.99, "eps": 1e-8, "weight_decay": 0.1},
    **{"clip_norm": 0.5, "warmup_steps": 0, "decay_steps": 0},
)
SGD = optax.sgd(0.1)
WIDTHS = (0.05, 0.1)
MESHES = {
    "alone": {},
    "zero1": {"data": 8},
    "fsdp": {"fsdp": 8},
    "mixed": {"data": 2, "fsdp": 2, "tensor": 2},
}


def init(key):
    """Parameters without zeros, so that no gradient is zero."""
    params = dit.init(CONFIG, key)
    return jax.tree.map(lambda x: x + 0.02 * jax.random.normal(key, x.shape), params)


def make_mesh(name):
    devices = jax.devices() if MESHES[name] else jax.devices()[:1]
    return sharding.make_mesh(**MESHES[name], devices=devices)


@functools.cache
def train(name, optimizer=MUON, widths=WIDTHS):
    """(state, metrics) after each of two steps on a mesh."""
    mesh, key = make_mesh(name), jax.random.key(0)
    step = steps.make_train_step(
        dit.make_apply(CONFIG, gather=sharding.make_gather(mesh)),
        ddpm.DDPM(schedules.linear()),
        optimizer,
        **{"nulls": {"y": 10}, "class_dropout_prob": 0.1, "ema_decay": 0.75, "ema_warmup": False},
        accumulation_steps=1,
        ema_exponents=tuple(map(power_ema.exponent_of, widths)),
    )
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (16, 4, 4, 1)).astype(np.uint8)
    batch = {"image": image, "label": rng.integers(0, 10, 16).astype(np.int32)}
    options = {"shard_optimizer": True, "num_averages": len(widths)}
    state = states.create(init, optimizer, key, mesh, **options)
    jitted = jax.jit(step, out_shardings=(states.shardings(state), None))
    batch = jax.device_put(batch, sharding.of_batch(mesh))
    first = jitted(state, batch, key)
    return first, jitted(first[0], batch, key)


def flat(tree):
    return traverse_util.flatten_dict(tree, sep="/")


@pytest.mark.slow  # the fast tests hold the shardings: compiling takes most of a minute
@pytest.mark.parametrize("name", ["zero1", "fsdp", "mixed"])
def test_every_mesh_gives_the_same_parameters(name):
    (one, one_metrics), (many, many_metrics) = train("alone")[-1], train(name)[-1]
    for key, value in one_metrics.items():
        assert float(many_metrics[key]) == pytest.approx(float(value), rel=1e-4), key
    for mine, theirs in ((one.params, many.params), (one.averages, many.averages)):
        for x, y in zip(jax.tree.leaves(mine), jax.tree.leaves(theirs), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-5)  # float32 in another order


def test_the_first_average_takes_the_parameters_whole_and_a_wider_one_lags():
    (state, _), (later, _) = train("alone", SGD)
    for average in state.averages:
        for path, x in flat(average).items():
            np.testing.assert_allclose(x, flat(state.params)[path], rtol=1e-6, atol=1e-7)
    narrow, wide, last = (
        flat(tree)["x_embedder/proj/kernel"] for tree in (*later.averages, later.params)
    )
    assert np.abs(wide - last).max() > np.abs(narrow - last).max() > 0


def test_averages_change_nothing_of_what_is_learned():
    (state, metrics), (plain, others) = train("alone", SGD)[-1], train("alone", SGD, ())[-1]
    assert plain.averages == () and metrics == others
    for name in ("params", "ema", "opt_state"):  # two programs, which XLA may round differently
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-9),
            getattr(state, name),
            getattr(plain, name),
        )


@pytest.mark.parametrize("name", ["zero1", "fsdp", "mixed"])
def test_the_state_of_muon_is_sharded_as_its_parameters(name):
    state = states.abstract(
        init, MUON, jax.random.key(0), make_mesh(name), shard_optimizer=True, num_averages=2
    )
    (_, inner) = state.opt_state
    muon, adam = (
        {path: x for path, x in flat(tree).items() if hasattr(x, "sharding")}  # no MaskedNode
        for tree in (
            inner.inner_states["muon"].inner_state[0].mu["blocks"],
            inner.inner_states["adam"].inner_state[0].mu["blocks"],
        )
    )
    ema, found = flat(state.ema["blocks"]), muon | adam
    assert muon.keys() == {path for path in ema if path.endswith("kernel")}
    assert found.keys() == ema.keys() and not muon.keys() & adam.keys()
    for path, x in found.items():
        assert x.sharding == ema[path].sharding, path
        assert x.sharding.spec[0] is None, path  # the axis of layers
    for average in state.averages:
        assert jax.tree.map(lambda x: x.sharding, average) == jax.tree.map(
            lambda x: x.sharding, state.ema
        )
    kernels = [x for path, x in found.items() if path.endswith("kernel")]
    assert not any(x.sharding.is_fully_replicated for x in kernels)


@pytest.mark.slow  # checkpoint/test_store.py restores on a mesh, the test before has the shardings
def test_a_checkpoint_of_muon_and_averages_is_restored_on_another_mesh(tmp_path):
    options = {"shard_optimizer": True, "num_averages": 2}
    state = states.create(init, MUON, jax.random.key(0), make_mesh("alone"), **options)
    with store.open_writer(background=False) as writer:
        store.save(writer, tmp_path, 2, state.saved, {"model": {}})
    templates = states.abstract(init, MUON, jax.random.key(0), make_mesh("mixed"), **options)
    items = store.restore(tmp_path, 2, templates.saved)
    assert jax.tree.structure(items) == jax.tree.structure(state.saved)
    for x, y in zip(jax.tree.leaves(items), jax.tree.leaves(state.saved), strict=True):
        np.testing.assert_array_equal(x, y)
    for x, y in zip(jax.tree.leaves(items), jax.tree.leaves(templates.saved), strict=True):
        assert x.sharding.is_equivalent_to(y.sharding, x.ndim)
