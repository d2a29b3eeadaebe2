"""Averages of the parameters whose length is chosen after training (Karras et al. 2024).

A power-function average at update t weighs the parameters of update s with (s / t)^exponent, so it
grows with the run. Its width is the standard deviation of these weights over s, as a share of t.
Snapshots of two such averages combine linearly to any width (https://arxiv.org/abs/2312.02696,
section 3 and appendix C). NumPy in float64; `ema.py` has the update.
"""

from typing import NamedTuple

import numpy as np

from dit_jax import settings
from dit_jax.errors import UserError

MAX_ERROR = 0.1  # a reconstruction that is expected to be further off is refused


class Snapshot(NamedTuple):
    """An average of this width, as it was after this update."""

    step: int
    width: float


def exponent_of(width):
    """The exponent of a width; UserError unless 0 < width < 1 / sqrt(12)."""
    settings.check_width("width", width)
    ratio = width**-2.0
    return float(np.roots([1, 7, 16 - ratio, 12 - ratio]).real.max())


def reconstruct(snapshots, step, width):
    """(coefficients, error) of the average of a width after update `step`.

    snapshots: [Snapshot], one of them at that step; later ones get 0. The coefficients, one for
    each snapshot, have the sum 1. error: how far the combination is expected to be from the average
    itself, as a share of the distance between the average and the last parameters, if these move at
    random. UserError if the width cannot be reconstructed from these snapshots.
    """
    if step not in {each.step for each in snapshots}:
        known = ", ".join(map(str, sorted({each.step for each in snapshots})))
        raise UserError(f"step must be one of the snapshots' {known}, got {step}")
    used = np.array([each.step <= step for each in snapshots])
    times = np.array([each.step for each in snapshots], np.float64)[used]
    exponents = np.array([exponent_of(each.width) for each in snapshots])[used]
    time, exponent = np.array([float(step)]), np.array([exponent_of(width)])
    found = np.linalg.solve(
        _overlap(times, exponents, times, exponents), _overlap(times, exponents, time, exponent)
    )[:, 0]
    found /= found.sum()
    coefficients = np.zeros(len(snapshots))
    coefficients[used] = found
    error = _expected_error(times, exponents, found, time, exponent)
    if error > MAX_ERROR:
        raise UserError(
            f"width must be one that snapshots of {len(set(times))} steps can give, got {width:g}: "
            f"the result would be off by {error:.0%} of its distance to the last parameters"
        )
    return coefficients, error


def _overlap(times, exponents, other_times, other_exponents):
    """The inner products of weights whose sums are 1, (A, B)."""
    t, u = times[:, None] / other_times, np.maximum(times[:, None], other_times)  # (A, B)
    a, b = exponents[:, None], other_exponents
    decline = np.where(t < 1, t**b, t**-a)
    return (a + 1) * (b + 1) * decline / ((a + b + 1) * u)


def _expected_error(times, exponents, coefficients, time, exponent):
    """Error of a combination / distance to the last parameters, for a random walk.

    The average of a random walk is that of its steps, each with the share of the weight that comes
    after it. So both are norms of cumulative weights.
    """
    end = time[0]
    whole = _overlap_of_sums(time, exponent, time, exponent, end)[0, 0]
    mixed = _overlap_of_sums(times, exponents, time, exponent, end)[:, 0]
    own = _overlap_of_sums(times, exponents, times, exponents, end)
    square = whole - 2 * coefficients @ mixed + coefficients @ own @ coefficients
    return float(np.sqrt(max(square, 0) / whole))


def _overlap_of_sums(times, exponents, other_times, other_exponents, end):
    """Integrals to `end` of products of cumulative weights, min(1, s/t)^(exponent + 1), (A, B)."""
    t, u = np.broadcast_arrays(times[:, None], other_times)
    a, b = np.broadcast_arrays(exponents[:, None] + 1, other_exponents + 1)
    first = t <= u  # (t, a) is the one that ends first
    t, u = np.where(first, t, u), np.where(first, u, t)
    a, b = np.where(first, a, b), np.where(first, b, a)
    both = t * (t / u) ** b / (a + b + 1)
    one = (u - t * (t / u) ** b) / (b + 1)
    return both + one + end - u
