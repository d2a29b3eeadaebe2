"""Where sampling stops on its way from noise to data: the spacings of `process.Levels`.

The checks need no jax. Shapes: S steps.
"""

import numpy as np

from dit_jax.diffusion import fields
from dit_jax.errors import UserError

EDGE = 1e-3  # how far log_snr stays from the ends of a path, where it is infinite
# log(alpha / sigma) of the first level of trailing and log_snr, at least: below, the x0 of a
# predicted noise is its error, many times enlarged. diffusers' lambda_min_clipped for the cosine.
LOWEST = -5.1


def check(diffusion, num_steps, *, spacing, shift):
    """UserError if the process of a `settings.Diffusion` has no such `levels`."""
    is_path = fields.is_path(diffusion)
    if spacing != "auto" and not num_steps.isdecimal():
        raise UserError(f"spacing must be auto for num_steps {num_steps}, got {spacing}")
    if spacing == "leading" and is_path:
        raise UserError(
            "spacing must be auto, linspace, trailing or log_snr for a path, where leading steps "
            "would not begin at noise, got leading"
        )
    if shift and (not is_path or "," in num_steps):
        which = "a list of times" if is_path else "process ddpm, which counts steps"
        raise UserError(f"shift must be 0 for {which}, got {shift}")
    if "," in num_steps:
        _check_times(num_steps, is_path, fields.last_time(diffusion))
    else:
        fields.check_num_steps(diffusion, num_steps)


def _check_times(num_steps, is_path, last):
    times = _times(num_steps)
    if (np.diff(times) >= 0).any():
        raise UserError(f"num_steps must be times that descend, got {num_steps}")
    if is_path and not 0 < times.min() <= times.max() <= last:
        raise UserError(f"num_steps must be times above 0 and at most {last}, got {num_steps}")
    if not is_path and (times.max() > last or (times % 1).any()):
        raise UserError(f"num_steps must be whole steps in 0 .. {last}, got {num_steps}")


def count(num_steps):
    """How many steps "20", "ddim50" or "999,600,300" are."""
    is_list = "," in num_steps
    return num_steps.count(",") + 1 if is_list else int(num_steps.removeprefix("ddim"))


def _times(num_steps):
    """The times of "999,600,300"."""
    return np.array([float(each) for each in num_steps.split(",")])


def choose(sampler):
    """The name of the spacing that "auto" means for a sampler.

    linspace ends with two very unequal steps in log(alpha / sigma), which samplers of order 2 and 3
    cannot use.
    """
    return "trailing" if sampler in ("heun", "dpm2m", "unipc") else "linspace"


def levels(process, num_steps, *, spacing="linspace", shift=0.0, last_step=0.0):
    """The Levels of a process for "20" steps, "ddim50", or a list of times, "999,600,300".

    spacing: which of the T steps of DDPM a number of steps keeps, with the names of diffusers (its
    multistep schedulers leave out the last point of linspace and leading):

    - linspace: from T - 1 to 0, evenly.
    - leading: every k-th from 0, for the largest whole k: they begin before all is noise.
    - trailing: every k-th from T - 1, for a real k: the last is above 0. Good for few steps.
    - log_snr: from T - 1 to 0, evenly in log(alpha / sigma), rounded to different steps.

    For trailing and log_snr, T ends at LOWEST, which leaves out some 5 of the 1,000 steps of the
    squared cosine and none of the linear schedule.

    On a path linspace and trailing are equal steps from noise to data, and "ddim50" is "50". shift:
    of `times.shift`, for a path; 0: that of the process, and none for log_snr. last_step: the last
    time of a path, before its shift, from which one step leads to the data; 0: as far as the steps
    before.
    """
    if "," in num_steps:
        return process.levels_at(_times(num_steps))
    if process.shift is not None:
        count = fields.path_steps(num_steps, process.least_steps)
        return process.levels_at(_along_path(process, count, spacing, shift, last_step))
    if spacing == "linspace" or num_steps.startswith("ddim"):
        return process.levels(num_steps)
    count, total = int(num_steps), process.last_time + 1
    if spacing == "leading":
        return process.levels_at(np.arange(count)[::-1] * (total // count))
    alpha, sigma = process.alpha_sigma(np.arange(total))
    total = max(count, int((np.log(alpha / sigma) >= LOWEST).sum()))
    if spacing == "log_snr":
        return process.levels_at(_different(_in_log_snr(process, count, total - 1, 0)))
    return process.levels_at(np.rint(total - np.arange(count) * (total / count)) - 1)


def _along_path(process, count, spacing, shift, last_step):
    """The times of `count` levels of a path, descending from its first one."""
    from dit_jax.diffusion import times  # imports jax

    first = process.levels("2").time[0]
    if spacing == "log_snr":
        found, own_shift = _in_log_snr(process, count, min(first, 1 - EDGE), EDGE), 1.0
    elif last_step:
        found, own_shift = np.linspace(first, last_step, count), process.shift
    else:
        found, own_shift = np.linspace(first, 0, count + 1)[:-1], process.shift
    return np.minimum(times.shift(found, shift or own_shift), first)


def _in_log_snr(process, count, first, last):
    """Times from `first` to `last`, evenly in log(alpha / sigma)."""
    alpha, sigma = process.alpha_sigma(np.array([first, last]))
    return process.time_at(np.linspace(*np.log(alpha / sigma), count))


def _different(steps):
    """Steps, descending from T - 1 to 0, as moved apart where several are the same."""
    rising, count = steps[::-1], np.arange(len(steps))
    rising = np.maximum.accumulate(rising - count) + count  # at least one above the step before
    return np.minimum(rising, steps[0] - count[::-1])[::-1]
