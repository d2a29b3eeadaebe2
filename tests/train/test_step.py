import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dit_jax.diffusion import ddpm, schedules
from dit_jax.machine import sharding
from dit_jax.models import dit, routing
from dit_jax.train import state as states
from dit_jax.train import step as steps

CONFIG = dit.configure("Ti", 4, input_size=(8, 8), in_channels=1, num_classes=10)
PROCESS = ddpm.DDPM(schedules.linear())
NULLS = {"y": 10}
ROUTE = routing.make(CONFIG, 0.5, ())  # two of four tokens skip two of four blocks


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (16, 8, 8, 1)).astype(np.uint8)
    return {"image": image, "label": rng.integers(0, 10, 16).astype(np.int32)}


SGD = optax.sgd(0.1)


@functools.cache  # compiles once for all tests
def make_step(*, accumulation_steps=1, route=None):
    """(jitted step, state, key) of a tiny DiT on eight devices; the state is not donated."""
    step = steps.make_train_step(
        dit.make_apply(CONFIG),
        PROCESS,
        SGD,
        nulls=NULLS,
        class_dropout_prob=0.1,
        ema_decay=0.75,
        ema_warmup=False,
        accumulation_steps=accumulation_steps,
        routing=route,
    )
    key, mesh = jax.random.key(0), sharding.make_mesh()
    state = states.create(perturbed_init, SGD, key, mesh, shard_optimizer=False)
    return jax.jit(step), state, key


def perturbed_init(key):
    """Parameters without zeros, so that no gradient is zero."""
    params = dit.init(CONFIG, key)
    return jax.tree.map(lambda x: x + 0.02 * jax.random.normal(key, x.shape), params)


def shard(batch, mesh):
    return jax.device_put(batch, sharding.of_batch(mesh))


def assert_close(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)  # float32 sums in another order


def test_pixels_become_model_units_and_x0_stays_as_it_is():
    x = steps.to_x0({"image": np.array([0, 255], np.uint8)}, jax.random.key(0))
    np.testing.assert_allclose(x, [-1, 1])
    latents = jnp.array([3.0])
    assert steps.to_x0({"x0": latents}, jax.random.key(0)) is latents


def test_x0_is_drawn_from_the_posterior_with_the_key():
    mean, log_variance = jnp.full((4, 32, 32, 2), 3.0), jnp.full((4, 32, 32, 2), np.log(0.25))
    batch = {"posterior": jnp.concatenate([mean, log_variance], axis=-1)}
    one, two = (steps.to_x0(batch, jax.random.key(seed)) for seed in (0, 1))
    assert one.shape == (4, 32, 32, 2)
    np.testing.assert_allclose([one.mean(), one.std()], [3, 0.5], rtol=0.03)  # 8,192 draws
    assert abs(np.corrcoef(one.ravel(), two.ravel())[0, 1]) < 0.05


def test_examples_are_a_function_of_the_key_and_drop_labels():
    many = {"image": np.zeros((20_000, 1, 1, 1), np.uint8), "label": np.zeros(20_000, np.int32)}
    options = {"class_dropout_prob": 0.1}
    first, again, other = (
        steps.make_examples(jax.random.key(i), many, PROCESS, **options) for i in (0, 0, 1)
    )
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, first, again)))
    assert not np.array_equal(first["noise"], other["noise"])
    assert np.mean(first["dropped"]) == pytest.approx(0.1, abs=0.01)  # 5 sigma
    assert (int(first["t"].min()), int(first["t"].max())) == (0, 999)
    assert float(first["t"].mean()) == pytest.approx(499.5, abs=10)
    kept = steps.make_examples(jax.random.key(0), many, PROCESS, class_dropout_prob=0.0)
    assert "dropped" not in kept


def test_the_ema_is_of_the_new_parameters(batch):
    step, state, key = make_step()
    new, _ = step(state, batch, key)
    expected = jax.tree.map(lambda old, x: 0.75 * old + 0.25 * x, state.params, new.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), new.ema, expected)
    assert int(new.step) == 1
    moved = optax.tree.norm(jax.tree.map(jnp.subtract, new.params, state.params))
    assert float(moved) > 1e-3


def test_the_loss_is_the_sum_of_its_terms(batch):
    step, state, key = make_step()
    _, metrics = step(state, batch, key)
    assert float(metrics["loss"]) == pytest.approx(float(metrics["mse"] + metrics["vb"]), rel=1e-6)
    assert float(metrics["grad_norm"]) > 0


@pytest.mark.parametrize("accumulation_steps", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_accumulation_gives_the_same_update(batch, accumulation_steps):
    whole, state, key = make_step()
    parts, _, _ = make_step(accumulation_steps=accumulation_steps)
    (a, a_metrics), (b, b_metrics) = whole(state, batch, key), parts(state, batch, key)
    assert_close((a.params, a_metrics), (b.params, b_metrics))


def test_eight_devices_compute_the_same_update_as_one(batch):
    step, state, key = make_step()
    on_eight, eight_metrics = step(state, shard(batch, sharding.make_mesh()), key)
    alone = jax.device_put(jax.device_get(state), jax.devices()[0])
    on_one, one_metrics = step(alone, jax.device_put(batch, jax.devices()[0]), key)
    assert len(on_eight.params["x_embedder"]["proj"]["kernel"].sharding.device_set) == 8
    assert_close((on_eight.params, eight_metrics), (on_one.params, one_metrics))


def test_the_same_tokens_skip_blocks_on_eight_devices_and_in_micro_batches(batch):
    whole, state, key = make_step(route=ROUTE)
    parts, _, _ = make_step(accumulation_steps=2, route=ROUTE)
    alone = jax.device_put(jax.device_get(state), jax.devices()[0])
    a, a_metrics = whole(alone, jax.device_put(batch, jax.devices()[0]), key)
    b, b_metrics = parts(state, shard(batch, sharding.make_mesh()), key)
    assert_close((a.params, a_metrics), (b.params, b_metrics))
    _, metrics = make_step()[0](state, batch, key)
    assert abs(float(a_metrics["loss"]) - float(metrics["loss"])) > 1e-4  # it is another program


def test_examples_do_not_depend_on_the_number_of_devices(batch):
    def make(batch):
        options = {"class_dropout_prob": 0.1, "routing": ROUTE}
        return steps.make_examples(jax.random.key(3), batch, PROCESS, **options)

    spread = jax.jit(make)(shard(batch, sharding.make_mesh()))
    alone = jax.jit(make)(jax.device_put(batch, jax.devices()[0]))
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, spread, alone)))


@pytest.mark.slow
def test_thirty_steps_lower_the_loss(batch):
    step, state, key = make_step()
    losses = []
    for _ in range(30):
        state, metrics = step(state, batch, key)
        losses.append(float(metrics["loss"]))
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])
