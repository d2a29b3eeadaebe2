import math

import pytest

from dit_jax.train import divergence


def test_a_metric_that_is_not_finite_is_named_with_its_step():
    divergence.check_finite({"loss": 1.0, "grad_norm": 2.0}, 3)
    for value in (math.nan, math.inf, -math.inf):
        with pytest.raises(divergence.Diverged, match=f"^grad_norm is {value} at step 3$"):
            divergence.check_finite({"loss": 1.0, "grad_norm": value}, 3)


def test_a_spike_is_a_multiple_of_the_usual_loss():
    spikes = divergence.Spikes(2.0, [1.0, 1.0, 9.0, 1.0, 1.0])
    spikes.check(1.9, 6)
    with pytest.raises(divergence.Diverged, match="loss 2.1 is above 2 times 1, .* last 6, at st"):
        spikes.check(2.1, 7)
    assert spikes.losses == [1.0, 1.0, 9.0, 1.0, 1.0, 1.9]  # the spike is no usual loss


def test_few_losses_and_a_factor_of_0_tell_nothing():
    for spikes in (divergence.Spikes(2.0, [1.0] * 4), divergence.Spikes(0, [1.0] * 4)):
        spikes.check(100.0, 5)
        assert spikes.losses == [1.0] * 4 + [100.0]
    spikes = divergence.Spikes(0, [1.0] * 20)
    spikes.check(100.0, 21)
    assert spikes.losses[-1] == 100.0


def test_old_losses_are_forgotten():
    spikes = divergence.Spikes(3.0)
    for step in range(60):
        spikes.check(1.1**step, step)
    assert len(spikes.losses) == divergence.WINDOW
