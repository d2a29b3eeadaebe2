"""Checks of a `settings.Diffusion` without jax: which fields and steps fit together."""

from dit_jax import settings
from dit_jax.diffusion import schedules
from dit_jax.errors import UserError

PREDICTIONS = {  # of each process, the usual one first
    "ddpm": ("noise", "v", "x0"),
    "linear": ("velocity", "noise", "v", "x0"),
    "gvp": ("velocity", "noise", "v", "x0"),
    "mean_flow": ("velocity",),
    "improved_mean_flow": ("velocity", "x0"),
}
MEAN_FLOWS = ("mean_flow", "improved_mean_flow")  # of `mean_flow.AverageVelocity`
ONLY_PATHS = {"shift": 1.0, "time_scale": 1000.0, "reverse_time": False}  # values for DDPM
ONLY_PATHS |= {"noise_scale": 1.0}
UNUSED = {  # {field: (another field, its values with which the first has no effect, the default)}
    "time_mean": ("time", ("uniform",), 0.0),
    "time_std": ("time", ("uniform",), 1.0),
    "weight_gamma": ("weight", ("constant", "velocity"), 0.0),
}
ONLY_OF = {  # {field: the processes that have it}; the others keep its default
    **dict.fromkeys(("same_times", "adaptive_power", "adaptive_eps", "uniform_times"), MEAN_FLOWS),
    **dict.fromkeys(("omega", "kappa", "omega_interval"), ("mean_flow",)),
    **dict.fromkeys(("omega_max", "omega_decay"), ("improved_mean_flow",)),
}
NOT_OF_MEAN_FLOWS = {"weight": "constant", "stratified": False, "shift": 1.0}  # their values
MAX_STEPS = 100_000  # of a path


def is_path(diffusion):
    """Whether the process is a path with real times in 0 .. 1, without steps."""
    return diffusion.process != "ddpm"


def is_mean_flow(diffusion):
    """Whether the network learns average velocities, for which its loss takes a jvp of it."""
    return diffusion.process in MEAN_FLOWS


def needs_null(diffusion):
    """Whether the loss guides by the network without a label."""
    is_guided = (diffusion.omega, diffusion.kappa) != (1, 0)
    return {"mean_flow": is_guided, "improved_mean_flow": True}.get(diffusion.process, False)


def watched(diffusion):
    """The metric that says how well a network has learned: not the loss where it is always 1."""
    return "mse" if is_mean_flow(diffusion) else "loss"


def check(diffusion):
    """UserError if there is no process of a `settings.Diffusion`."""
    name, predictions = diffusion.process, PREDICTIONS[diffusion.process]
    if diffusion.prediction not in predictions:
        raise UserError(
            f"prediction must be one of {', '.join(predictions)} for process {name}, "
            f"got {diffusion.prediction}"
        )
    for field, (choice, without, value) in UNUSED.items():
        given, chosen = getattr(diffusion, field), getattr(diffusion, choice)
        if chosen in without and given != value:
            rule = f"{field} must be left at {value} for {choice} {chosen}, which does not use it"
            raise UserError(f"{rule}, got {given}")
    _check_mean_flow(diffusion)
    if diffusion.weight == "velocity" and diffusion.prediction == "velocity":
        raise UserError("weight must be constant for prediction velocity, got velocity: the same")
    if diffusion.weight == "velocity" and not is_path(diffusion):
        raise UserError(
            "weight must not be velocity for process ddpm, only for paths, got velocity"
        )
    if is_path(diffusion):
        return
    for field, value in ONLY_PATHS.items():
        if (given := getattr(diffusion, field)) != value:
            raise UserError(
                f"{field} must be {value} for process ddpm, which counts steps, got {given}"
            )
    if diffusion.time != "uniform":
        raise UserError(f"time must be uniform for process ddpm, got {diffusion.time}")
    schedules.make(diffusion.schedule, diffusion.num_steps)


def _check_mean_flow(diffusion):
    """UserError for fields of the mean flows with another process, and the other way round."""
    name, usual = diffusion.process, settings.Diffusion()
    fixed = {
        field: getattr(usual, field) for field, owners in ONLY_OF.items() if name not in owners
    }
    fixed |= NOT_OF_MEAN_FLOWS if is_mean_flow(diffusion) else {}
    for field, value in fixed.items():
        if (given := getattr(diffusion, field)) != value:
            rule = f"{field} must be left at {value} for process {name}, which does not use it"
            raise UserError(f"{rule}, got {given}")
    first, last = diffusion.omega_interval
    if first < 0 or last > 1:
        raise UserError(f"omega_interval must be first <= last in 0 .. 1, got {(first, last)}")


def last_time(diffusion):
    """`process.Process.last_time` of a `settings.Diffusion`."""
    return 1 if is_path(diffusion) else diffusion.num_steps - 1


def check_num_steps(diffusion, num_steps):
    """UserError if the process has no `levels(num_steps)`."""
    if is_path(diffusion):
        path_steps(num_steps, 1 if is_mean_flow(diffusion) else 2)
    else:
        schedules.keep_steps(diffusion.num_steps, num_steps)


def path_steps(num_steps, least):
    """How many steps "50" or "ddim50" means on a path: the same; UserError for anything else."""
    text = str(num_steps)
    if not settings.SPACING.fullmatch(text):
        raise UserError(f"num_steps must be {settings.SPACING_RULE}, got {num_steps!r}")
    count = int(text.removeprefix("ddim"))
    if not least <= count <= MAX_STEPS:
        raise UserError(f"num_steps must be in {least} .. {MAX_STEPS}, got {num_steps!r}")
    return count


def shown(diffusion):
    """{field: value} of the process that a checkpoint is sampled with, without its training."""
    path = ("process", "prediction", "shift", "time_scale", "reverse_time", "noise_scale")
    path += ("weight",) if diffusion.weight == "velocity" else ()  # it says how outputs are read
    names = path if is_path(diffusion) else ("process", "schedule", "num_steps", "prediction")
    return {name: getattr(diffusion, name) for name in names}
