"""Rules that the values of settings keep: each gives a field a default, a test and its words."""

import dataclasses
import re
from dataclasses import field

from dit_jax.errors import UserError

MAX_STEPS = 2**31 - 1  # a run counts its steps in int32
MAX_WIDTH = 12**-0.5  # the width of the plain mean of all steps; see `train.power_ema`
_RANGE, _COUNT = "[0-9]{1,9}(-[0-9]{1,9})?", "[0-9]{1,9}"
SCHEDULE = re.compile(rf"none|every:{_COUNT}(:{_COUNT}-{_COUNT})?|steps:{_RANGE}(\+{_RANGE})*")
WIDTH = f"above 0 and below {MAX_WIDTH:.4f}"

CONDITIONS = {  # of a model by the process, if not t and y; as models.conditions, which needs jax
    "mean_flow": ("t", "h", "y"),
    "improved_mean_flow": ("t", "h", "omega", "t_min", "t_max", "y"),
}


def keeps(rule, fits, default, **more):
    """A field whose value `fits` the rule, which is in words."""
    return field(default=default, metadata={"rule": (rule, fits), **more})


def by_process(default, **more):
    """A field that a config may leave to the process, as None; default: of DDPM."""
    return field(default=default, metadata={"by_process": True, **more})


def at_least(least, default):
    return keeps(f"at least {least}", lambda x: x >= least, default)


def steps(least, default):
    """A number of steps to which the optimizer or the loop counts."""
    return keeps(f"in {least} .. {MAX_STEPS}", lambda x: least <= x <= MAX_STEPS, default)


def above(bound, default, **more):
    return keeps(f"above {bound}", lambda x: x > bound, default, **more)


def fraction(default):
    return keeps("in [0, 1)", lambda x: 0 <= x < 1, default)


def share(default):
    return keeps("in 0 .. 1", lambda x: 0 <= x <= 1, default)


def one_of(names, default):
    return keeps(f"one of {', '.join(names)}", lambda x: x in names, default)


def tuple_of(rule, fits):
    """A tuple, empty by default, whose every value `fits`."""
    return keeps(f"a list of {rule}", lambda values: all(map(fits, values)), ())


def names(allowed):
    """A tuple of names, empty by default; read with `split`."""
    words = f"a list of {' or '.join(allowed)}"
    return keeps(words, lambda values: set(values) <= set(allowed), (), names=True)


def split(names):
    """("t,y",) of the command line as ("t", "y")."""
    if not isinstance(names, tuple) or not all(isinstance(name, str) for name in names):
        return names
    return tuple(each for name in names for each in name.split(","))


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


def blocks():
    """Numbers of the first and the last of several blocks; empty: chosen by the model."""
    return keeps("two whole numbers of at least 0, or empty", _are_blocks, ())


def _are_blocks(value):
    return len(value) in (0, 2) and all(type(x) is int and x >= 0 for x in value)


def is_pattern(value):
    try:
        return bool(value) and bool(re.compile(value))
    except (re.error, TypeError):
        return False


def fit_process(settings, fields):
    """Settings with values for the process wherever the fields leave them to it, as None."""
    diffusion, model, sampling = settings.diffusion, settings.model, settings.sampling
    is_path = diffusion.process != "ddpm"
    # A SiT that was converted when there were no paths has the other fields of DDPM.
    is_older = is_path and "process" not in fields["diffusion"]

    def is_left(topic, name):
        return is_older or fields.get(topic, {}).get(name) is None

    if is_left("model", "learn_sigma"):
        model = dataclasses.replace(model, learn_sigma=not is_path)
    elif is_path and model.learn_sigma:
        raise UserError(
            f"model.learn_sigma must be false for process {diffusion.process}, which learns no "
            "variance, got true"
        )
    conditions = CONDITIONS.get(diffusion.process, ("t", "y"))
    if is_left("model", "conditions"):
        model = dataclasses.replace(model, conditions=conditions)
    elif model.conditions not in (conditions, _without_time(conditions)):
        also = ", with or without t," if "h" in conditions else ""
        raise UserError(
            f"model.conditions must be {','.join(conditions)} in this order{also} for process "
            f"{diffusion.process}, got {','.join(map(str, model.conditions))}"
        )
    if is_left("diffusion", "time_scale") and diffusion.process in CONDITIONS:
        diffusion = dataclasses.replace(diffusion, time_scale=1.0)
    if is_left("sampling", "cfg_interval"):
        last = 1 if is_path else diffusion.num_steps - 1
        sampling = dataclasses.replace(sampling, cfg_interval=(0, last))
    fitted = {"model": model, "diffusion": diffusion, "sampling": sampling}
    return dataclasses.replace(settings, **fitted)


def _without_time(conditions):
    """All but t, for a network that knows by h how far it steps; else the conditions."""
    return conditions[1:] if "h" in conditions else conditions


def check_averages(train, *, usual):
    """UserError for widths of averages that are not tracked; usual: the default ones."""
    if train.ema_widths != usual and not train.ema_snapshot_every:
        raise UserError(
            f"train.ema_widths must be {usual} without train.ema_snapshot_every, "
            f"got {train.ema_widths}"
        )


def check_best(run):
    """UserError if steps are kept by a score that they do not have."""
    if run.keep_best_by == "score" and not run.score_every:
        raise UserError("run.keep_best_by must be loss if run.score_every is 0, got 'score'")
    if run.keep_best_by == "score" and run.checkpoint_every % run.score_every:
        raise UserError(
            f"run.checkpoint_every must be a multiple of run.score_every {run.score_every} if "
            f"run.keep_best_by is score, got {run.checkpoint_every}"
        )
