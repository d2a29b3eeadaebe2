"""Averages whose length is chosen after training, against the numbers of a public implementation.

testdata/golden_ema.npz has the arrays `ema.*` of the code of Karras et al. 2024: the parameters
after each of 512 updates, snapshots of two averages of them, and averages of other widths.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.errors import UserError
from dit_jax.train import ema, power_ema
from dit_jax.train.power_ema import Snapshot

FILE = Path(__file__).parents[1] / "testdata" / "golden_ema.npz"


@pytest.fixture(scope="module")
def numbers():
    with np.load(FILE) as file:
        return dict(file)


def track(path, widths):
    """The averages of float32 parameters (K, D) after each update: (K, widths, D)."""
    exponents = [power_ema.exponent_of(width) for width in widths]

    def update(averages, given):
        step, params = given
        weights = [ema.power_weight(step, exponent=each) for each in exponents]
        averages = [
            ema.mix(old, params, weight=w) for old, w in zip(averages, weights, strict=True)
        ]
        return averages, jnp.stack(averages)

    path = jnp.asarray(path, jnp.float32)
    steps = jnp.arange(len(path), dtype=jnp.int32)
    return np.asarray(
        jax.lax.scan(update, [jnp.full_like(path[0], 7.0) for _ in widths], (steps, path))[1]
    )


def of_golden(numbers):
    return [
        Snapshot(int(s), float(w))
        for s, w in zip(numbers["in_step"], numbers["in_std"], strict=True)
    ]


def test_exponents_are_those_of_the_public_code(numbers):
    for width, exponent in zip(numbers["std"], numbers["gamma"], strict=True):
        assert power_ema.exponent_of(float(width)) == pytest.approx(exponent, rel=1e-12)


def test_weights_of_updates_are_those_of_the_public_code(numbers):
    for width, beta in zip(numbers["stds"], numbers["beta"], strict=True):
        exponent = power_ema.exponent_of(float(width))
        weights = [float(ema.power_weight(k, exponent=exponent)) for k in range(len(beta))]
        np.testing.assert_allclose(weights, 1 - beta, rtol=1e-6)


@pytest.mark.parametrize("step", [10**5, 4 * 10**5, 10**7])
def test_the_weight_of_a_late_update_is_exact_in_float32(step):
    weight = jax.jit(lambda step: ema.power_weight(step, exponent=16.97))(jnp.int32(step))
    assert float(weight) == pytest.approx(-np.expm1(17.97 * np.log1p(-1 / (step + 1))), rel=1e-6)


def test_snapshots_are_those_of_the_public_code(numbers, check_close):
    every = int(numbers["every"])
    averages = track(numbers["path"], numbers["stds"])[every - 1 :: every]
    check_close("ema.snapshots", averages, numbers["snapshots"], 1e-6)


def test_coefficients_and_averages_are_those_of_the_public_code(numbers, check_close):
    known, x = of_golden(numbers), numbers["snapshots"].reshape(16, -1)
    for i, width in enumerate(map(float, numbers["wanted"])):
        found, _ = power_ema.reconstruct(known, 512, width)
        np.testing.assert_allclose(found, numbers["coefficients"][:, i], atol=1e-12)
        check_close("ema.reconstructed", found @ x, numbers["reconstructed"][i], 1e-12)
        early, _ = power_ema.reconstruct(known, int(numbers["earlier_step"]), width)
        check_close("ema.earlier", early @ x, numbers["earlier_reconstructed"][i], 1e-12)
        assert not early[[each.step > numbers["earlier_step"] for each in known]].any()
        last = numbers["path"][-1]
        distance = np.linalg.norm(numbers["tracked_at_wanted"][i] - last)
        off = np.linalg.norm(found @ x - numbers["tracked_at_wanted"][i])
        assert off < 0.02 * distance


@pytest.mark.parametrize("width", [0.05, 0.1])
def test_a_tracked_width_is_reconstructed(numbers, width):
    averages = track(numbers["path"], numbers["stds"])
    known = of_golden(numbers)
    found, error = power_ema.reconstruct(known, 512, width)
    x = averages[63::64].reshape(16, -1).astype(np.float64)
    tracked = averages[-1, list(numbers["stds"]).index(width)]
    distance = np.linalg.norm(tracked - numbers["path"][-1])
    assert np.linalg.norm(found @ x - tracked) < 1e-6 * distance and error < 1e-6


def test_a_constant_path_stays_constant():
    path = np.full((64, 3), 1.25)
    averages = track(path, (0.05, 0.1))
    np.testing.assert_array_equal(averages, 1.25)
    known = [Snapshot(step, width) for step in range(8, 65, 8) for width in (0.05, 0.1)]
    found, _ = power_ema.reconstruct(known, 64, 0.15)
    assert found.sum() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("width", [0.05, 0.1, 0.2])
def test_a_linear_path_averages_to_its_share(width):
    """theta_k = k: the mean of the weights (s / t)^g is (g + 1) / (g + 2) t, but for the steps."""
    count, g = 1000, power_ema.exponent_of(width)
    (average,) = track(np.arange(1, count + 1)[:, None], (width,))[-1]
    assert float(average[0]) == pytest.approx((g + 1) / (g + 2) * count, abs=1)


@pytest.mark.parametrize(
    "count, width, expected",
    [(8, 0.075, 4e-3), (8, 0.2, 0.021), (16, 0.13, 4e-4), (16, 0.025, 0.023), (32, 0.25, 8e-3)],
)
def test_the_expected_error_is_that_of_random_walks(count, width, expected):
    """expected: measured on random walks, to about 15 %."""
    known = [Snapshot(100 * (i + 1), w) for i in range(count) for w in (0.05, 0.1)]
    _, error = power_ema.reconstruct(known, 100 * count, width)
    assert error == pytest.approx(expected, rel=0.2)
    path = np.cumsum(np.random.default_rng(0).normal(size=(100 * count, 500)), axis=0)
    averages = track(path, (0.05, 0.1, width))
    found, _ = power_ema.reconstruct(known, 100 * count, width)
    x = averages[99::100, :2].reshape(2 * count, -1).astype(np.float64)
    off, distance = (np.linalg.norm(averages[-1, 2] - y) for y in (found @ x, path[-1]))
    assert off / distance == pytest.approx(error, rel=0.25)


@pytest.mark.parametrize("width", [0.0, -0.1, 0.2887, 1.0, float("nan")])
def test_a_width_outside_its_range_is_refused(width):
    with pytest.raises(UserError, match="^width must be above 0 and below 0.2887, got "):
        power_ema.exponent_of(width)


def test_what_cannot_be_reconstructed_is_refused():
    known = [Snapshot(step, width) for step in range(8, 65, 8) for width in (0.05, 0.1)]
    with pytest.raises(
        UserError,
        match=r"width must be one that snapshots of 8 steps can give, got 0.015: .* by 53%",
    ):
        power_ema.reconstruct(known, 64, 0.015)
    with pytest.raises(UserError, match="^step must be one of the snapshots' 8, 16, .*, got 60$"):
        power_ema.reconstruct(known, 60, 0.1)
