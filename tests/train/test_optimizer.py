import jax
import numpy as np
import pytest

from dit_jax.errors import UserError
from dit_jax.train import optimizer


def rates(steps, **options):
    defaults = {"learning_rate": 1e-4, "warmup_steps": 0, "decay_steps": 0}
    schedule = optimizer.learning_rate_schedule(**defaults | options)
    return [float(schedule(step)) for step in steps]


def test_the_learning_rate_is_constant_without_warmup_and_decay():
    np.testing.assert_allclose(rates([0, 1, 10_000_000]), 1e-4)


def test_the_learning_rate_rises_in_warmup_and_falls_to_zero():
    warm = rates([0, 5, 10, 20], warmup_steps=10)
    np.testing.assert_allclose(warm, [0, 0.5e-4, 1e-4, 1e-4], rtol=1e-6)
    short = rates([0, 10, 60, 110, 120], warmup_steps=10, decay_steps=110)
    np.testing.assert_allclose(short, [0, 1e-4, 0.5e-4, 0, 0], rtol=1e-5, atol=1e-12)


def test_decay_must_end_after_warmup():
    with pytest.raises(UserError, match="decay_steps must be 0 or above warmup_steps 10, got 10"):
        rates([0], warmup_steps=10, decay_steps=10)


def test_adamw_follows_its_formula():
    values = {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.1}
    adamw = optimizer.adamw(learning_rate=0.01, warmup_steps=0, decay_steps=0, **values)
    params = expected = np.array([1.0, -2.0])
    m = v = np.zeros(2)
    with jax.numpy_dtype_promotion("standard"):
        state = adamw.init(params.astype(np.float32))
        for i, grad in enumerate([np.array([0.3, -0.1]), np.array([-0.2, 0.4])], start=1):
            updates, state = adamw.update(grad.astype(np.float32), state, params.astype(np.float32))
            params = params + np.asarray(updates)
            m, v = 0.9 * m + 0.1 * grad, 0.999 * v + 0.001 * grad**2
            adam = (m / (1 - 0.9**i)) / (np.sqrt(v / (1 - 0.999**i)) + 1e-8)
            expected = expected - 0.01 * (adam + 0.1 * expected)
    np.testing.assert_allclose(params, expected, rtol=1e-5)
