import math

import pytest

from dit_jax.train import divergence


def test_a_metric_that_is_not_finite_is_named_with_its_step():
    divergence.check_finite({"loss": 1.0, "grad_norm": 2.0}, 3)
    for value in (math.nan, math.inf, -math.inf):
        with pytest.raises(divergence.Diverged, match=f"^grad_norm is {value} at step 3$"):
            divergence.check_finite({"loss": 1.0, "grad_norm": value}, 3)


def test_a_loss_above_factor_times_the_median_raises():
    losses = [1.0] * 18 + [9.0, 1.0]
    spikes = divergence.Spikes(2.0, losses)
    spikes.check(1.9, 21)
    with pytest.raises(divergence.Diverged, match="loss 2.1 is above 2 times 1, .* last 21, at"):
        spikes.check(2.1, 22)
    assert spikes.losses == [*losses, 1.9]  # without the spike


@pytest.mark.parametrize("factor, count", [(2.0, divergence.FEWEST - 1), (0, divergence.WINDOW)])
def test_too_few_losses_or_factor_0_never_raise(factor, count):
    spikes = divergence.Spikes(factor, [1.0] * count)
    spikes.check(100.0, 5)
    assert spikes.losses[-1] == 100.0


def test_only_the_last_losses_are_kept():
    """The losses grow by a tenth. Each is below 1.1^51 times the median of the last 100 only."""
    spikes = divergence.Spikes(1.1**51)
    for step in range(3 * divergence.WINDOW):
        spikes.check(1.1**step, step)
    assert len(spikes.losses) == divergence.WINDOW
