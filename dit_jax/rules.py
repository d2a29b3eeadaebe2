"""Rules that the values of settings keep: each gives a field a default, a test and its words."""

import re
from dataclasses import field

MAX_STEPS = 2**31 - 1  # a run counts its steps in int32
MAX_WIDTH = 12**-0.5  # the width of the plain mean of all steps; see `train.power_ema`
_RANGE, _COUNT = "[0-9]{1,9}(-[0-9]{1,9})?", "[0-9]{1,9}"
SCHEDULE = re.compile(rf"none|every:{_COUNT}(:{_COUNT}-{_COUNT})?|steps:{_RANGE}(\+{_RANGE})*")
WIDTH = f"above 0 and below {MAX_WIDTH:.4f}"


def keeps(rule, fits, default, **more):
    """A field whose value `fits` the rule, which is in words."""
    return field(default=default, metadata={"rule": (rule, fits), **more})


def by_process(default):
    """A field that a config may leave to the process, as None; default: of DDPM."""
    return field(default=default, metadata={"by_process": True})


def at_least(least, default):
    return keeps(f"at least {least}", lambda x: x >= least, default)


def steps(least, default):
    """A number of steps to which the optimizer or the loop counts."""
    return keeps(f"in {least} .. {MAX_STEPS}", lambda x: least <= x <= MAX_STEPS, default)


def above(bound, default):
    return keeps(f"above {bound}", lambda x: x > bound, default)


def fraction(default):
    return keeps("in [0, 1)", lambda x: 0 <= x < 1, default)


def one_of(names, default):
    return keeps(f"one of {', '.join(names)}", lambda x: x in names, default)


def tuple_of(rule, fits):
    """A tuple, empty by default, whose every value `fits`."""
    return keeps(f"a list of {rule}", lambda values: all(map(fits, values)), ())


def interval(default):
    """Times of the process, first and last, which a config may leave to the process."""
    return keeps("two numbers, first <= last", _is_interval, default, by_process=True)


def schedule():
    """Which steps of a sampling are computed, as `diffusion.forecasts.read` reads it."""
    rule = 'none, "every:3", "every:3:10-40" or "steps:0+4+8-11"'
    return keeps(rule, SCHEDULE.fullmatch, "none")


def widths(default):
    """Widths of power-function averages: see `train.power_ema`."""
    return keeps(f"different widths, each {WIDTH}", _are_widths, default)


def _is_interval(value):
    numbers = len(value) == 2 and all(type(x) in (int, float) for x in value)
    return numbers and value[0] <= value[1]


def _are_widths(values):
    return 0 < len(values) == len(set(values)) and all(map(is_width, values))


def is_width(value):
    return isinstance(value, (int, float)) and 0 < value < MAX_WIDTH


def is_pattern(value):
    try:
        return bool(value) and bool(re.compile(value))
    except (re.error, TypeError):
        return False
