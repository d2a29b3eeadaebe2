import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.train import ema


def test_update_is_a_weighted_mean_of_every_leaf():
    average = {"a": jnp.full(3, 2.0), "b": {"c": jnp.full((2, 2), -1.0)}}
    params = {"a": jnp.full(3, 12.0), "b": {"c": jnp.full((2, 2), 9.0)}}
    new = ema.update(average, params, decay=0.9)
    assert jax.tree.structure(new) == jax.tree.structure(params)
    np.testing.assert_allclose(new["a"], np.full(3, 3.0), rtol=1e-6)
    np.testing.assert_allclose(new["b"]["c"], np.zeros((2, 2)), atol=1e-6)


def test_average_of_a_constant_is_the_constant_exactly():
    params = {"a": jax.random.normal(jax.random.key(0), (100,))}
    average = params
    for _ in range(10):
        average = ema.update(average, params, decay=0.9999)
    np.testing.assert_array_equal(average["a"], params["a"])


def test_average_is_the_weighted_sum_of_all_past_parameters():
    """From p0: 0.5^3 p0 + 0.5^3 p1 + 0.5^2 p2 + 0.5 p3."""
    past = [{"a": jnp.asarray(x)} for x in (8.0, 16.0, -4.0, 2.0)]
    average = past[0]
    for params in past[1:]:
        average = ema.update(average, params, decay=0.5)
    assert float(average["a"]) == 8 / 8 + 16 / 8 - 4 / 4 + 2 / 2


@pytest.mark.parametrize("step", [0, 1, 1000])
def test_without_warmup_the_decay_is_constant(step):
    assert ema.decay_at(jnp.asarray(step, jnp.int32), decay=0.9999, warmup=False) == 0.9999


@pytest.mark.parametrize(
    "step, expected", [(0, 0.1), (1, 2 / 11), (90, 0.91), (99_989, 0.9999), (10**6, 0.9999)]
)
def test_with_warmup_the_decay_rises(step, expected):
    decay = jax.jit(lambda step: ema.decay_at(step, decay=0.9999, warmup=True))
    # float32 rounds the decay by up to 2^-24 = 6e-8.
    assert float(decay(jnp.asarray(step, jnp.int32))) == pytest.approx(expected, rel=1e-6)


def test_an_update_takes_the_decay_of_a_traced_step():
    @jax.jit
    def update(average, params, step):
        return ema.update(average, params, decay=ema.decay_at(step, decay=0.9999, warmup=True))

    new = update({"a": jnp.zeros(2)}, {"a": jnp.ones(2)}, jnp.asarray(0, jnp.int32))
    np.testing.assert_allclose(new["a"], np.full(2, 0.9), rtol=1e-6)
    assert new["a"].dtype == jnp.float32
