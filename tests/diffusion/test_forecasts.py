import numpy as np
import pytest

from dit_jax import settings
from dit_jax.diffusion import forecasts
from dit_jax.errors import UserError

TIME = np.array([9.0, 8.5, 7.0, 6.5, 4.0, 3.8, 2.0, 1.5, 1.0, 0.0])  # unevenly spaced
COMPUTED = np.array([1, 1, 0, 1, 0, 1, 1, 0, 0, 1], bool)


def predict(forecast, values):
    """What a Forecast makes of values (S,): each from those that it keeps; NaN before the first."""
    kept, found = np.zeros(forecast.num_kept), []
    for i, value in enumerate(values):
        found.append(forecast.weights[i] @ kept if i else np.nan)
        if forecast.computed[i]:
            kept[forecast.slot[i]] = value
    return np.array(found)


@pytest.mark.parametrize("order", range(4))
def test_taylor_is_exact_for_polynomials_on_uneven_steps(order):
    forecast = forecasts.make(TIME, COMPUTED, order=order)
    assert forecast.num_kept == order + 1
    first = np.searchsorted(COMPUTED.cumsum(), order + 1) + 1  # has order + 1 values before it
    values = np.polyval(np.arange(1, order + 2), TIME)
    np.testing.assert_allclose(predict(forecast, values)[first:], values[first:], rtol=1e-10)
    too_steep = TIME ** (order + 1)
    assert np.abs(predict(forecast, too_steep) - too_steep)[first:].max() > 0.1


@pytest.mark.parametrize("fit", settings.CACHE_FITS)
@pytest.mark.parametrize("order", range(4))
def test_a_constant_is_forecast_exactly_by_every_fit(order, fit):
    found = predict(forecasts.make(TIME, COMPUTED, order=order, fit=fit), np.full(10, 3.0))
    np.testing.assert_allclose(found[1:], 3)


def test_order_0_repeats_the_last_value_and_the_order_grows():
    values = TIME**2
    last = predict(forecasts.make(TIME, COMPUTED, order=0), values)
    np.testing.assert_array_equal(last[1:], values[[0, 1, 1, 3, 3, 5, 6, 6, 6]])
    lower = [predict(forecasts.make(TIME, COMPUTED, order=k), values) for k in (0, 1, 3)]
    assert lower[2][1] == lower[0][1] and lower[2][2] == lower[1][2]  # of one and two values


def test_chebyshev_smooths_noise_and_follows_a_line():
    """It amplifies errors less than the polynomial through the values, whose weights are larger."""
    smooth, exact = (
        forecasts.make(TIME, COMPUTED, order=2, fit=f) for f in ("chebyshev", "taylor")
    )
    assert smooth.num_kept == 4 and exact.num_kept == 3
    sums = [np.abs(each.weights[4:]).sum(axis=1) for each in (smooth, exact)]
    assert (sums[0] < sums[1]).all()
    time, even = np.linspace(1, 0, 13), np.arange(13) % 2 == 0
    found = predict(forecasts.make(time, even, order=1, fit="chebyshev"), time)
    np.testing.assert_allclose(found[3:], time[3:], atol=0.01)


@pytest.mark.parametrize(
    "text, steps",
    [
        ("none", range(10)),
        ("every:1", range(10)),
        ("every:3", [0, 3, 6, 9]),
        ("every:4", [0, 4, 8, 9]),
        ("every:9", [0, 9]),
        ("every:3:2-7", [0, 1, 2, 5, 8, 9]),
        ("steps:4", [0, 4, 9]),
        ("steps:0-2+5+7-9", [0, 1, 2, 5, 7, 8, 9]),
    ],
)
def test_a_schedule_says_which_steps_are_computed(text, steps):
    assert settings.read_topic(settings.Sampling, {"cache": text}).cache == text
    found = forecasts.read(text, 10)
    assert np.flatnonzero(found).tolist() == list(steps)
    np.testing.assert_array_equal(forecasts.read(forecasts.write(found), 10), found)


def test_a_second_schedule_counts_the_steps_of_the_first():
    among = np.array([0, 0, 1, 0, 1, 0, 1, 0, 1, 1], bool)
    found = forecasts.read("every:2", 10, among=among)
    assert np.flatnonzero(found).tolist() == [2, 6, 9]
    found = forecasts.read("steps:4", 10, among=among)
    assert np.flatnonzero(found).tolist() == [2, 4, 9]
    assert not forecasts.read("every:2", 10, among=np.zeros(10, bool)).any()


@pytest.mark.parametrize(
    "text, message",
    [
        ("every:10", "cache must be every:N with N in 1 .. 9 for 10 steps, got every:10"),
        ("every:0", "cache must be every:N with N in 1 .. 9 for 10 steps, got every:0"),
        ("every:2:5-10", "cache must be of steps in 0 .. 9 for 10 steps, got 5-10 in every:2:5-10"),
        ("every:2:5-4", "cache must have ranges of first <= last, got 5-4 in every:2:5-4"),
        ("steps:0+10", r"cache must be of steps in 0 .. 9 for 10 steps, got 10 in steps:0\+10"),
    ],
)
def test_a_schedule_that_does_not_fit_the_steps_is_one_line(text, message):
    with pytest.raises(UserError, match=f"^{message}$"):
        forecasts.read(text, 10)


def test_steps_without_a_guided_call_have_no_null_pass_to_compute():
    rule = "cache_guidance must be of steps that compute the guided network, got step 3 in steps:3"
    with pytest.raises(UserError, match=rule):
        forecasts.read("steps:3", 4, name="cache_guidance", among=np.array([1, 1, 1, 0], bool))
