import functools

import jax
import numpy as np
import optax
import pytest
from flax import traverse_util

from dit_jax.diffusion import ddpm, schedules
from dit_jax.errors import UserError
from dit_jax.machine import sharding
from dit_jax.models import dit
from dit_jax.train import frozen, optimizer
from dit_jax.train import state as states
from dit_jax.train import step as steps

CONFIG = dit.DiTConfig((4, 4), 2, 1, 2, 16, 2, 10, True, True, "adaln_zero")
SHAPES = jax.eval_shape(lambda: dit.init(CONFIG, jax.random.key(0)))
PATTERNS = ("blocks/attn", "^x_embedder", "y_embedder")
RATE = 0.1
SGD = optax.sgd(RATE, momentum=0.9)  # its state is one array for each parameter


def flat(tree):
    return traverse_util.flatten_dict(tree, sep="/")


def is_frozen(path):
    return path.startswith(("blocks/attn/", "x_embedder/", "y_embedder/"))


def init(key):
    """Parameters without zeros, so that no gradient is zero."""
    params = dit.init(CONFIG, key)
    return jax.tree.map(lambda x: x + 0.02 * jax.random.normal(key, x.shape), params)


@functools.cache
def train_once(patterns, *, accumulation_steps=1, **sizes):
    """(state before, state after, metrics) of one step on a mesh of these sizes, {}: one device."""
    devices = jax.devices() if sizes else jax.devices()[:1]
    mesh, key = sharding.make_mesh(**sizes, devices=devices), jax.random.key(0)
    optimizer = frozen.leave_out(SGD, patterns)
    step = steps.make_train_step(
        dit.make_apply(CONFIG, gather=sharding.make_gather(mesh)),
        ddpm.DDPM(schedules.linear()),
        optimizer,
        nulls={"y": 10},
        class_dropout_prob=0.1,
        ema_decay=0.75,
        ema_warmup=False,
        accumulation_steps=accumulation_steps,
        frozen=patterns,
    )
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (16, 4, 4, 1)).astype(np.uint8)
    batch = {"image": image, "label": rng.integers(0, 10, 16).astype(np.int32)}
    before = states.create(init, optimizer, key, mesh, shard_optimizer=True)
    jitted = jax.jit(step, out_shardings=(states.shardings(before), None))
    return before, *jitted(before, jax.device_put(batch, sharding.of_batch(mesh)), key)


def test_patterns_divide_the_parameters_and_merge_restores_them():
    trained, rest = frozen.split(SHAPES, PATTERNS)
    assert all(is_frozen(path) for path in flat(rest))
    assert not any(is_frozen(path) for path in flat(trained))
    assert "y_embedder" not in trained and trained["blocks"].keys() == {"adaLN_modulation", "mlp"}
    assert frozen.merge(trained, rest) == SHAPES
    assert frozen.split(SHAPES, ()) == (SHAPES, {})


@pytest.mark.parametrize(
    "sizes", [pytest.param({}, marks=pytest.mark.slow), {"data": 2, "fsdp": 2, "tensor": 2}]
)
def test_frozen_parameters_stay_and_the_others_train_as_usual(sizes):
    before, after, metrics = train_once(PATTERNS, **sizes)
    _, usual, usual_metrics = train_once(())
    assert metrics["loss"] == pytest.approx(float(usual_metrics["loss"]), rel=1e-5)
    for path, x in flat(jax.device_get(after.params)).items():
        if is_frozen(path):
            np.testing.assert_array_equal(x, flat(before.params)[path])
            np.testing.assert_array_equal(flat(after.ema)[path], x)
        else:  # float32 sums in another order
            np.testing.assert_allclose(x, flat(usual.params)[path], rtol=1e-4, atol=1e-6)
            assert not np.array_equal(x, flat(before.params)[path]), path
    trace = flat(after.opt_state[0].trace)
    assert trace.keys() == {path for path in flat(SHAPES) if not is_frozen(path)}
    if sizes:
        assert not any(x.sharding.is_fully_replicated for x in trace.values())


def test_without_patterns_the_state_is_the_optimizers_own():
    """So a run that was saved before the patterns existed resumes."""
    options = {"learning_rate": 0.1, "b1": 0.9, "b2": 0.99, "eps": 1e-8, "weight_decay": 0.0}
    options |= {"clip_norm": 0.0, "warmup_steps": 5, "decay_steps": 10}
    adamw = optimizer.make("adamw", **options)
    wrapped = jax.eval_shape(frozen.leave_out(adamw, ()).init, SHAPES)
    assert wrapped == jax.eval_shape(adamw.init, SHAPES)


@pytest.mark.parametrize("accumulation_steps", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_the_gradient_norm_is_of_the_trained_parameters(accumulation_steps):
    before, after, usual = train_once(())
    grads = flat(jax.tree.map(lambda x, y: (x - y) / RATE, before.params, after.params))
    trained = optax.tree.norm([x for path, x in grads.items() if not is_frozen(path)])
    _, _, metrics = train_once(PATTERNS, accumulation_steps=accumulation_steps)
    # float32: a gradient from a difference of parameters has few digits
    assert float(metrics["grad_norm"]) == pytest.approx(float(trained), rel=1e-3)
    assert float(metrics["grad_norm"]) < 0.999 * float(usual["grad_norm"])


@pytest.mark.parametrize(
    "patterns, message",
    [
        (("y_embeder",), "got 'y_embeder', which matches none; the nearest are y_embedder, "),
        (("blocks/atn",), "got 'blocks/atn', which matches none; the nearest are blocks/attn, "),
        (("blocks", "mlp$"), r"got 'mlp\$', which matches none; the nearest are .*mlp"),
        ((".",), r"^train.frozen must leave a parameter to train, got \('.',\)$"),
    ],
)
def test_a_pattern_that_does_not_fit_is_refused(patterns, message):
    frozen.check(SHAPES, PATTERNS)
    with pytest.raises(UserError, match=message):
        frozen.check(SHAPES, patterns)


def test_what_is_frozen_is_described():
    assert frozen.describe(SHAPES, ("y_embedder", "t_embedder/fc2")) == (
        "448 of 15,016 parameters are frozen: "
        "t_embedder/fc2/bias, t_embedder/fc2/kernel, y_embedder/embedding_table/embedding"
    )
