import jax
import numpy as np
import pytest

from dit_jax.diffusion import ddpm, flow, schedules, times

COUNT = 4096
LAWS = {
    "uniform": times.Draw(),
    "logit_normal": times.Draw("logit_normal", -0.5, 0.8),
}


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("stratified", [False, True])
def test_draws_have_their_law(law, stratified):
    draw = LAWS[law]._replace(stratified=stratified)
    t = np.sort(times.draw(draw, jax.random.key(0), (COUNT,)))
    assert t.dtype == np.float32 and t[0] >= 0 and t[-1] < 1
    quantiles = (np.arange(COUNT) + 0.5) / COUNT
    expected = quantiles
    if law == "logit_normal":
        expected = times.logit_normal(jax.scipy.special.ndtri(np.float32(quantiles)), -0.5, 0.8)
    # Kolmogorov and Smirnov: 2 / sqrt(N) is passed once in 3000 draws; strata are within 1 / N.
    share = np.searchsorted(t, expected) / COUNT
    assert np.abs(share - quantiles).max() < (2 / COUNT if stratified else 2 / np.sqrt(COUNT))


def test_strata_are_drawn_within_and_not_only_at_fixed_times():
    draw = times.Draw(stratified=True)
    first, second = (times.draw(draw, jax.random.key(i), (8,)) for i in range(2))
    np.testing.assert_array_equal(np.floor(8 * first), np.arange(8))
    assert (np.asarray(first) != np.asarray(second)).all()


def test_stratified_steps_of_ddpm_are_as_frequent_as_uniform_ones():
    process = ddpm.DDPM(schedules.squared_cosine(8), stratified=True)
    t = process.draw_time(jax.random.key(0), (64,))
    assert t.dtype == np.int32
    np.testing.assert_array_equal(np.bincount(t), np.full(8, 8))


@pytest.mark.parametrize("prediction, first", [("velocity", 0), ("noise", 1e-3), ("x0", 1e-3)])
def test_times_of_a_path_keep_away_from_the_ends(prediction, first):
    process = flow.Flow("linear", prediction, draw=times.Draw("logit_normal", 0.0, 50.0))
    t = process.draw_time(jax.random.key(0), (COUNT,))
    assert t.min() == np.float32(first) and t.max() == np.float32(1 - first)
