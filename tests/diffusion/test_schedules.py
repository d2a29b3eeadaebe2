import numpy as np
import pytest

from dit_jax.diffusion import schedules


def test_golden_respacing(golden, check_close):
    short = schedules.respace(schedules.linear(), "250")
    check_close("timesteps/250", short.timestep, golden["timesteps/250"], 0)
    check_close("betas/250", short.beta, golden["betas/250"], 1e-12)
    strided = schedules.respace(schedules.linear(), "ddim25")
    check_close("timesteps/ddim25", strided.timestep, golden["timesteps/ddim25"], 0)


def test_linear_ends_where_the_paper_does():
    schedule = schedules.linear()
    assert (schedule.beta[0], schedule.beta[-1]) == (1e-4, 0.02)
    np.testing.assert_allclose(np.diff(schedule.beta), (0.02 - 1e-4) / 999, rtol=1e-9)
    assert schedule.alpha_bar[999] == pytest.approx(4.0358e-5, rel=1e-5)


def test_a_shorter_linear_ends_as_noisy():
    short, long = schedules.linear(100), schedules.linear(1000)
    assert np.log(short.alpha_bar[-1]) == pytest.approx(np.log(long.alpha_bar[-1]), rel=0.1)


def test_squared_cosine():
    schedule = schedules.squared_cosine()
    time = np.arange(1, 1000) / 1000
    f = np.cos((np.append(0, time) + 0.008) / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(schedule.alpha_bar[:999], f[1:] / f[0], rtol=1e-9)
    assert schedule.beta[999] == 0.999  # where the formula alone would leave no signal at all


@pytest.mark.parametrize("name", schedules.SCHEDULES)
def test_tables_agree_with_one_another(name):
    schedule = schedules.make(name, 1000)
    assert schedule.num_steps == 1000
    assert {table.dtype for table in schedule[:-1]} == {np.dtype(np.float64)}
    np.testing.assert_array_equal(schedule.timestep, np.arange(1000))
    np.testing.assert_array_equal(schedule.alpha_bar_prev[1:], schedule.alpha_bar[:-1])
    assert schedule.alpha_bar_prev[0] == 1
    ratio = schedule.alpha_bar / schedule.alpha_bar_prev
    np.testing.assert_allclose(ratio, 1 - schedule.beta, rtol=1e-12)
    assert (np.diff(schedule.alpha_bar) < 0).all() and schedule.alpha_bar[-1] > 0
    assert schedule.posterior_variance[0] == 0
    assert (schedule.posterior_variance[1:] < schedule.beta[1:]).all()
    log_variance = np.log(schedule.posterior_variance[1:])
    np.testing.assert_array_equal(schedule.posterior_log_variance[1:], log_variance)
    assert schedule.posterior_log_variance[0] == log_variance[0]


@pytest.mark.parametrize("name", schedules.SCHEDULES)
@pytest.mark.parametrize("spacing", ["2", "10", "250", "999", "1000", "ddim10", "ddim50"])
def test_respacing_keeps_alpha_bar(name, spacing):
    schedule = schedules.make(name, 1000)
    short = schedules.respace(schedule, spacing)
    assert short.num_steps == int(spacing.removeprefix("ddim"))
    kept = schedule.alpha_bar[short.timestep]
    np.testing.assert_allclose(short.alpha_bar, kept, rtol=1e-9, atol=1e-15)


def test_respacing_twice_counts_the_steps_of_the_first():
    schedule = schedules.linear()
    twice = schedules.respace(schedules.respace(schedule, "ddim100"), "ddim10")
    np.testing.assert_array_equal(twice.timestep, np.arange(0, 1000, 100))
    once = schedules.respace(schedule, "ddim10")
    np.testing.assert_allclose(twice.posterior_variance, once.posterior_variance, rtol=1e-9)


@pytest.mark.parametrize(
    "spacing, first, last",
    [("250", [0, 4, 8, 12], [995, 999]), ("4", [0, 333, 666, 999], []), ("ddim4", [0, 250], [750])],
)
def test_kept_steps(spacing, first, last):
    kept = schedules.keep_steps(1000, spacing)
    assert kept[: len(first)].tolist() == first
    assert kept[len(kept) - len(last) :].tolist() == last
    assert (np.diff(kept) > 0).all()


@pytest.mark.parametrize(
    "function, arguments, message",
    [
        (schedules.make, ("cubic", 10), "one of linear, squared_cosine, got 'cubic'"),
        (schedules.make, ("linear", 1), "num_steps must be at least 2, got 1"),
        (schedules.make, ("squared_cosine", 0), "num_steps must be at least 2, got 0"),
        (schedules.linear, (20,), "num_steps must be above 20 for the linear schedule, got 20"),
        (schedules.keep_steps, (1000, "fast"), '"250", or "ddim50", got \'fast\''),
        (schedules.keep_steps, (1000, "-5"), '"250", or "ddim50", got \'-5\''),
        (schedules.keep_steps, (1000, ""), "num_steps must be a whole number"),
        (schedules.keep_steps, (1000, 2.5), '"250", or "ddim50", got 2.5'),
        (schedules.keep_steps, (1000, 0), "num_steps must be in 2 .. 1000, got '0'"),
        (schedules.keep_steps, (1000, "1"), "num_steps must be in 2 .. 1000, got '1'"),
        (schedules.keep_steps, (1000, "1001"), "num_steps must be in 2 .. 1000, got '1001'"),
        (schedules.keep_steps, (1000, "ddim600"), "at a whole stride through 1000, .* 'ddim600'"),
    ],
)
def test_bad_schedule(function, arguments, message):
    with pytest.raises(ValueError, match=message):
        function(*arguments)


def test_21_steps_are_enough_for_linear():
    assert schedules.linear(21).beta[-1] < 1
