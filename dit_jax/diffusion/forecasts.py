"""When a sampling computes a value and how it forecasts it in between: the tables of `caches`.

All tables are float64 and made before the first step; nothing here needs jax. Shapes: S steps, K
values that are kept.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from dit_jax.errors import UserError

RIDGE = 0.01  # of `chebyshev`


class Forecast(NamedTuple):
    """A value that some steps of a sampling compute and the others forecast.

    computed (S,) bool. slot (S,): where a computed value is kept, in the place of the oldest.
    weights (S, K): a forecast is the sum of the kept values, times these; 0 for an empty slot.
    """

    computed: np.ndarray
    slot: np.ndarray
    weights: np.ndarray

    @property
    def num_kept(self):
        """K."""
        return self.weights.shape[1]


def make(time, computed, *, order, fit="taylor"):
    """The Forecast of values at times (S,), which fall from step to step.

    order: of the polynomial, as soon as order + 1 values are computed. fit: a name in `FITS`.

    The coordinate is the process's time: the value is a function of x and of the time, which is
    what the network is given. For evenly spaced steps that is the index of the step, as in
    TaylorSeer. Unlike log(alpha / sigma), it is finite at both ends.
    """
    size, weigh = order + FITS[fit].more, FITS[fit].weigh
    slot, weights, kept = np.zeros(len(time), int), np.zeros((len(time), size)), []
    for i in range(len(time)):
        if kept:
            nodes = 2 * (time[kept] - time[i]) / (time[kept[0]] - time[i]) - 1  # from 1 to -1
            weights[i, slot[kept]] = weigh(nodes, min(order, len(kept) - 1))
        if computed[i]:
            slot[i] = computed[:i].sum() % size
            kept = [*kept, i][-size:]
    return Forecast(np.asarray(computed), slot, weights)


def taylor(nodes, degree):
    """Weights of values at nodes (degree + 1,), 1 .. -1: the polynomial through them, at -1.

    Liu et al. 2025 (TaylorSeer, https://arxiv.org/abs/2503.06923). Differs from their formula,
    which puts finite differences into Taylor's series: Newton's interpolation, as here, is exact
    for polynomials, and at any spacing. Degree 0 is reuse, as in FORA (Selvaraju et al. 2024).
    """
    others = [nodes[np.arange(len(nodes)) != j] for j in range(len(nodes))]
    return np.array([np.prod((-1 - x) / (nodes[j] - x)) for j, x in enumerate(others)])


def chebyshev(nodes, degree):
    """The same of at least degree + 1 values: a ridge regression on Chebyshev's polynomials.

    Han et al. 2026 (Spectrum, https://arxiv.org/abs/2603.01623). Differs from theirs: the constant
    is not shrunk, so that a value that stays the same is forecast exactly, and the fit forgets all
    but the last order + 2 values.
    """
    terms = np.polynomial.chebyshev.chebvander(nodes, degree)
    penalty = np.diag(np.where(np.arange(degree + 1) > 0, RIDGE, 0.0))
    at_end = (-1.0) ** np.arange(degree + 1)
    return terms @ np.linalg.solve(terms.T @ terms + penalty, at_end)


class Fit(NamedTuple):
    """weigh(nodes, degree) -> weights. more: how many values it keeps, beyond the order."""

    weigh: Callable
    more: int


FITS = {"taylor": Fit(taylor, 1), "chebyshev": Fit(chebyshev, 2)}


def read(text, num_steps, *, name="cache", among=None):
    """(S,) bool: the steps that a schedule of `rules.schedule` computes, of those `among` (S,).

    The first and the last of these are always computed: before the first there is nothing to
    forecast from, and no later step corrects the last. UserError, naming the option, for steps
    that the sampling does not have.
    """
    among = np.ones(num_steps, bool) if among is None else among
    kind, _, rest = text.partition(":")
    if kind == "none" or not among.any():
        return among.copy()
    computed = np.zeros(num_steps, bool)
    if kind == "steps":
        for part in rest.split("+"):
            first, last = _read_range(part, num_steps, text, name)
            computed[first : last + 1] = True
        if wrong := np.flatnonzero(computed & ~among).tolist():
            rule = "of steps that compute the guided network"
            raise UserError(f"{name} must be {rule}, got step {wrong[0]} in {text}")
    else:
        every, _, span = rest.partition(":")
        first, last = _read_range(span, num_steps, text, name) if span else (0, num_steps - 1)
        if not 1 <= int(every) < num_steps:
            rule = f"every:N with N in 1 .. {num_steps - 1} for {num_steps} steps"
            raise UserError(f"{name} must be {rule}, got {text}")
        inside = np.flatnonzero(among[: last + 1])
        inside = inside[inside >= first]
        computed |= among
        computed[inside] = False
        computed[inside[:: int(every)]] = True
    computed[np.flatnonzero(among)[[0, -1]]] = True
    return computed


def _read_range(text, num_steps, schedule, name):
    """(first, last) of "5-9" or "5"."""
    first, _, last = text.partition("-")
    first, last = int(first), int(last or first)
    if last < first:
        raise UserError(f"{name} must have ranges of first <= last, got {text} in {schedule}")
    if last >= num_steps:
        rule = f"of steps in 0 .. {num_steps - 1} for {num_steps} steps"
        raise UserError(f"{name} must be {rule}, got {text} in {schedule}")
    return first, last


def write(computed):
    """The text of a schedule, as steps:0-2+5, of the steps that it computes, (S,) bool."""
    steps = np.flatnonzero(computed)
    runs = np.split(steps, np.flatnonzero(np.diff(steps) > 1) + 1)
    return "steps:" + "+".join(
        f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs
    )
