"""Noise schedules of DDPM as tables over its steps, in NumPy float64, and their respacing.

t is a step, 0 the cleanest. The tables stay float64 until `process.at` looks a step up.
"""

import reprlib
from typing import NamedTuple

import numpy as np

from dit_jax import settings
from dit_jax.errors import UserError


class Schedule(NamedTuple):
    """Tables (S,) over S steps, all of a diffusion or those that a respacing keeps."""

    beta: np.ndarray
    alpha_bar: np.ndarray
    alpha_bar_prev: np.ndarray  # alpha_bar one step earlier; 1 before step 0
    posterior_variance: np.ndarray  # of q(x_{t-1} | x_t, x_0), Ho et al. 2020, eq. 7
    posterior_log_variance: np.ndarray  # its logarithm; step 0 has the value of step 1
    timestep: np.ndarray  # each step's number in the diffusion that the model was trained on

    @property
    def num_steps(self):
        return len(self.beta)


def from_betas(beta, timestep):
    """The Schedule of the given betas. beta, timestep (S,), S at least 2."""
    alpha_bar = np.cumprod(1 - beta)
    alpha_bar_prev = np.append(1.0, alpha_bar[:-1])
    posterior_variance = beta * (1 - alpha_bar_prev) / (1 - alpha_bar)
    # The variance of step 0 is 0 and has no logarithm.
    posterior_log_variance = np.log(np.append(posterior_variance[1], posterior_variance[1:]))
    return Schedule(
        beta, alpha_bar, alpha_bar_prev, posterior_variance, posterior_log_variance, timestep
    )


def linear(num_steps=1000):
    """Ho et al. 2020, sec. 4: beta from 1e-4 to 0.02, at 1000 steps; scaled for other numbers."""
    _check_num_steps(num_steps)
    scale = 1000 / num_steps
    beta = np.linspace(scale * 1e-4, scale * 0.02, num_steps, dtype=np.float64)
    if beta[-1] >= 1:
        raise UserError(f"num_steps must be above 20 for the linear schedule, got {num_steps}")
    return from_betas(beta, np.arange(num_steps))


def squared_cosine(num_steps=1000):
    """Nichol & Dhariwal 2021, eq. 17: alpha_bar = cos^2((t/T + 0.008) / 1.008 * pi/2)."""
    _check_num_steps(num_steps)
    time = np.arange(num_steps + 1, dtype=np.float64) / num_steps
    alpha_bar = np.cos((time + 0.008) / 1.008 * np.pi / 2) ** 2
    beta = np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)
    return from_betas(beta, np.arange(num_steps))


SCHEDULES = {"linear": linear, "squared_cosine": squared_cosine}


def make(schedule, num_steps):
    """The Schedule of a name in `SCHEDULES`; UserError for another name."""
    if schedule not in SCHEDULES:
        raise UserError(f"schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}")
    return SCHEDULES[schedule](num_steps)


def respace(schedule, spacing):
    """The Schedule of the steps that `spacing` keeps; each keeps its alpha_bar.

    "250": 250 steps from the first to the last, evenly spaced and rounded. "ddim50": every k-th
    step for the smallest k that keeps exactly 50 (Song et al. 2021).
    """
    kept = keep_steps(schedule.num_steps, spacing)
    return from_alpha_bar(schedule.alpha_bar[kept], schedule.timestep[kept])


def from_alpha_bar(alpha_bar, timestep):
    """The Schedule of the given alpha_bar, descending. alpha_bar, timestep (S,), S at least 2."""
    return from_betas(1 - alpha_bar / np.append(1.0, alpha_bar[:-1]), timestep)


def keep_steps(num_steps, spacing):
    """The steps, ascending, that `spacing` keeps of num_steps; UserError if it is malformed."""
    if type(spacing) is int:
        spacing = str(spacing)
    if not isinstance(spacing, str) or not settings.SPACING.fullmatch(spacing):
        raise UserError(f"num_steps must be {settings.SPACING_RULE}, got {spacing!r}")
    digits = spacing.removeprefix("ddim")
    count = int(digits)
    if not 2 <= count <= num_steps:
        raise UserError(f"num_steps must be in 2 .. {num_steps}, got {spacing!r}")
    if spacing == digits:
        # As the official code: the strides are summed, which decides how halves are rounded.
        strides = np.full(count, (num_steps - 1) / (count - 1))
        strides[0] = 0
        return np.rint(np.cumsum(strides)).astype(np.int64)
    for stride in range(1, num_steps):
        kept = np.arange(0, num_steps, stride)
        if len(kept) == count:
            return kept
    raise UserError(
        f"num_steps must be ddimN with N steps at a whole stride through {num_steps}, as ddim50, "
        f"got {spacing!r}"
    )


def check_steps(num_steps, time):
    """Steps of a schedule of num_steps, descending, as int64; UserError if they are not."""
    steps = np.asarray(time)
    kept = np.rint(steps).astype(np.int64)
    if steps.ndim != 1 or len(steps) < 2 or (kept != steps).any() or (np.diff(kept) >= 0).any():
        raise UserError(
            f"steps must be at least two different whole numbers, descending, got {_show(steps)}"
        )
    if kept[0] >= num_steps or kept[-1] < 0:
        raise UserError(f"steps must be in 0 .. {num_steps - 1}, got {_show(steps)}")
    return kept


def _show(steps):
    return reprlib.repr(steps.tolist())


def _check_num_steps(num_steps):
    if num_steps < 2:
        raise UserError(f"num_steps must be at least 2, got {num_steps}")
