"""Solvers: samplers that follow the process's differential equation, for few network calls.

euler, heun and sde step in `Levels.rates`. dpm2m and unipc step in log(alpha / sigma) and remember
earlier predictions of x0. All coefficients are float64 tables, made before the first step. Where
alpha or sigma is 0 they are the limits. Shapes: S steps.
"""

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.diffusion import samplers
from dit_jax.diffusion.process import at
from dit_jax.diffusion.samplers import Sampler, State
from dit_jax.errors import UserError


def euler(levels):
    """Euler's method: order 1. For DDPM and on the linear path it is DDIM."""
    ratio, width = _rescaled_steps(levels)

    def step(predict, state, i, noise):
        slope = _slope(levels, predict(state.x, i), i)
        return State(at(ratio, i, state.x) * state.x + at(width, i, slope) * slope)

    return Sampler(levels.num_steps, State, step, samplers.once(levels), stochastic=False)


def heun(levels):
    """Heun's method (Karras et al. 2022, alg. 1): order 2 with two network calls in a step.

    The last step is one of Euler, because its second call would be at the data.
    """
    ratio, width = _rescaled_steps(levels)
    passes = 2 * samplers.once(levels)
    passes[-1] = 1

    def step(predict, state, i, noise):
        slope = _slope(levels, predict(state.x, i), i)
        start, width_i = at(ratio, i, slope) * state.x, at(width, i, slope)
        end = start + width_i * slope

        def correct():
            # As step i: guidance is decided once in a step.
            return start + width_i * (slope + _slope(levels, predict(end, i + 1, i), i + 1)) / 2

        return State(jax.lax.cond(i < levels.num_steps - 1, correct, lambda: end))

    return Sampler(levels.num_steps, State, step, passes, stochastic=False)


def sde(levels, *, form="sigma"):
    """Euler-Maruyama of the reverse SDE (Ma et al. 2024, SiT, https://arxiv.org/abs/2401.08740).

    A step of y = x / scale is (dy / du + w noise / sigma) du + sqrt(2 w |du|) z; the last one is
    without z. form: of w, in `WEIGHTS`. SiT makes 250 steps, of which the last is 0.04 wide.
    """
    ratio, width = _rescaled_steps(levels)
    weight, rates = _weight(levels, form), levels.rates
    drift = width * weight * rates.scale[:-1] / levels.sigma[:-1]  # of the noise
    spread = rates.scale[1:] * np.sqrt(2 * weight * np.abs(np.diff(rates.coordinate)))
    spread[-1] = 0

    def step(predict, state, i, noise):
        x, prediction = state.x, predict(state.x, i)
        slope = _slope(levels, prediction, i)
        x = at(ratio, i, x) * x + at(width, i, x) * slope + at(drift, i, x) * prediction.noise
        return State(x + at(spread, i, x) * noise)

    return Sampler(levels.num_steps, State, step, samplers.once(levels), stochastic=True)


def _diffusion(levels):
    """Half of the squared rate at which noise enters y: SiT's form SBDM."""
    rates = levels.rates
    sigma, alpha = levels.sigma / rates.scale, levels.alpha / rates.scale
    with np.errstate(divide="ignore"):
        return sigma * rates.d_sigma - rates.d_alpha / alpha * sigma**2


WEIGHTS = {  # w of `sde` at all levels; all but the first two need a path
    "sigma": lambda levels: levels.sigma / levels.rates.scale,
    "sbdm": _diffusion,
    "constant": lambda levels: np.ones_like(levels.sigma),
    "linear": lambda levels: levels.rates.coordinate,
    "decreasing": lambda levels: (1 - np.cos(np.pi * levels.rates.coordinate)) ** 2 / 4,
    "increasing_decreasing": lambda levels: np.sin(np.pi * levels.rates.coordinate) ** 2,
}


def _weight(levels, form):
    """w (S,) of a form in `WEIGHTS`; UserError if the levels have none."""
    if form not in ("sigma", "sbdm") and (levels.rates.scale != 1).any():
        raise UserError(f"sde_noise must be sigma or sbdm for a process without a path, got {form}")
    weight = WEIGHTS[form](levels)[:-1]
    if not np.isfinite(weight).all():
        raise UserError(f"sde_noise must be finite where sampling begins, got {form} at alpha 0")
    return weight


def dpm2m(levels, *, restarts=None):
    """DPM-Solver++ (2M), midpoint: order 2 with one network call in a step.

    Lu et al. 2022, https://arxiv.org/abs/2211.01095, alg. 2. restarts (S,): where a step must not
    use what earlier ones remember; None: nowhere.
    """
    advance, further = _first_order(levels), _extrapolation(levels, restarts)

    def init(x):
        return State(x, jnp.zeros_like(x))

    def step(predict, state, i, noise):
        x0, earlier = predict(state.x, i).x0, state.history
        towards = x0 + at(further, i, x0) * (x0 - earlier)
        return State(advance(state.x, towards, i), x0)

    return Sampler(levels.num_steps, init, step, samplers.once(levels), stochastic=False)


def unipc(levels, *, restarts=None):
    """UniPC of order 2 with B_2: the steps of `dpm2m`, each corrected by the next prediction.

    Zhao et al. 2023, https://arxiv.org/abs/2302.04867, alg. 5 and 6. The corrector makes it order 3
    without network calls of its own. restarts: as of `dpm2m`.
    """
    advance, further = _first_order(levels), _extrapolation(levels, restarts)
    is_corrected, of_old, of_new = _corrector(levels, restarts)

    def init(x):
        return State(x, (x, jnp.zeros_like(x), jnp.zeros_like(x)))

    def step(predict, state, i, noise):
        x0, (before, earlier, older) = predict(state.x, i).x0, state.history
        towards = at(of_old, i, x0) * (earlier - older) + at(of_new, i, x0) * (x0 - earlier)
        corrected = advance(before, earlier + towards, jnp.maximum(i - 1, 0))
        x = jnp.where(jnp.asarray(is_corrected)[i], corrected, state.x)
        towards = x0 + at(further, i, x0) * (x0 - earlier)
        return State(advance(x, towards, i), (x, x0, earlier))

    return Sampler(levels.num_steps, init, step, samplers.once(levels), stochastic=False)


def _rescaled_steps(levels):
    """(ratio, width): an Euler step of y = x / scale is ratio x + width dy / du, with u falling."""
    rates = levels.rates
    return rates.scale[1:] / rates.scale[:-1], rates.scale[1:] * np.diff(rates.coordinate)


def _slope(levels, prediction, i):
    """dy / du at level i."""
    x0, noise = prediction.x0, prediction.noise
    return at(levels.rates.d_alpha, i, x0) * x0 + at(levels.rates.d_sigma, i, x0) * noise


def _first_order(levels):
    """advance(x, x0, i): from level i to i + 1 if x0 were the same all the way, as DDIM."""
    ratio = levels.sigma[1:] / levels.sigma[:-1]
    share = levels.alpha[1:] - ratio * levels.alpha[:-1]

    def advance(x, x0, i):
        return at(ratio, i, x) * x + at(share, i, x) * x0

    return advance


def _widths(levels):
    """The steps (S,) in log(alpha / sigma); infinite from alpha 0 and to sigma 0."""
    with np.errstate(divide="ignore"):
        return np.diff(np.log(levels.alpha) - np.log(levels.sigma))


def _orders(levels, restarts):
    """1 or 2 for each step: 1 for the first, for one to sigma 0, and at restarts."""
    is_first = ~np.isfinite(_widths(levels))
    is_first[0] = True
    if restarts is not None:
        is_first |= restarts
    return np.where(is_first, 1, 2)


def _growth(levels):
    """The width of each step divided by the width of the step before it, (S,); for order 2."""
    width = _widths(levels)
    return np.where(np.isfinite(width), width, 1) / np.append(np.inf, width[:-1])


def _extrapolation(levels, restarts):
    """How much of the last change of x0 a step adds to x0, (S,); 0 in a step of order 1."""
    return np.where(_orders(levels, restarts) == 2, _growth(levels) / 2, 0)


def _corrector(levels, restarts):
    """(is_corrected, of_old, of_new), (S,): how UniPC repeats the step to level i with its x0.

    It adds to x0 of_old times its change before that step, and of_new times its change in it.
    """
    had_second_order = np.append(1, _orders(levels, restarts)[:-1]) == 2
    h = np.where(had_second_order, np.append(1, _widths(levels)[:-1]), 1)
    growth = np.where(had_second_order, np.append(1, _growth(levels)[:-1]), 1)
    exponential = np.expm1(-h)
    first = (-exponential / h - 1) / exponential  # b_1 and b_2 of alg. 5
    second = 2 * ((1 + exponential / h) / h - 0.5) / exponential
    old_share = (first - second) * growth / (1 + growth)
    is_corrected = np.arange(levels.num_steps) > 0
    if restarts is not None:
        is_corrected &= ~restarts
    of_old = np.where(had_second_order, old_share * growth, 0)
    return is_corrected, of_old, np.where(had_second_order, first - old_share, 0.5)


SAMPLERS = {
    "ddpm": samplers.ddpm,
    "ddim": samplers.ddim,
    "euler": euler,
    "heun": heun,
    "sde": sde,
    "dpm2m": dpm2m,
    "unipc": unipc,
}
