"""Checks of how samples are drawn that need neither jax nor parameters."""

from types import SimpleNamespace
from typing import Any, NamedTuple

from dit_jax import settings as settings_lib
from dit_jax.checkpoint import peek
from dit_jax.errors import UserError
from dit_jax.sampling import imagenet

# Options that a comparison can vary, each with its type.
SWEPT = {"cfg_scale": float, "num_steps": str, "sampler": str, "eta": float, "cfg_channels": int}
SWEPT |= {"spacing": str, "shift": float, "cfg_schedule": str, "omega": float}
SWEPT |= {"cache": str, "cache_guidance": str, "cache_order": int, "cache_fit": str}
ONLY_OF = {  # {option: (the sampler that has it, its value for the others)}
    "eta": ("ddim", 0),
    "sde_noise": ("sde", "sigma"),
    "sde_last": ("sde", 0.04),
}


class Known(NamedTuple):
    """What the meta of a checkpoint says of its model.

    model: has the fields of a `models.dit.DiTConfig`. class_names: as of a LoadedDiT.
    """

    model: Any
    settings: settings_lib.Settings
    class_names: tuple


def look(path):
    """The Known of a checkpoint; None if it is in a bucket or cannot be read."""
    meta = peek.meta_of(path, of="model")
    if not meta:
        return None
    settings = settings_lib.read(meta["config"])
    return Known(SimpleNamespace(**meta["model"]), settings, class_names(meta))


def class_names(meta):
    """The names of label 0, 1, ... by the meta of a checkpoint; () if it has none."""
    return imagenet.named(meta.get("class_names", ()))


def read_sweep(text, name="sweep", kinds=SWEPT):
    """(option, its values) of OPTION=VALUE,VALUE,...; UserError if it is none.

    name: of the argument. kinds: the options with their types; those of `settings.Sampling`, and
    perhaps the seed or ema_width.
    """
    option, equals, rest = text.partition("=")
    if not (option and equals and rest):
        raise UserError(f"{name} must be OPTION=VALUE,VALUE,..., got {text!r}")
    if option not in kinds:
        raise UserError(f"{name} must be over one of {', '.join(kinds)}, got {option!r}")
    values = [_read_value(option, each.strip(), kinds[option]) for each in rest.split(",")]
    if len(set(values)) < len(values):
        raise UserError(f"{name} must have each value once, got {text!r}")
    return option, values


def _read_value(option, text, kind):
    try:
        value = kind(text)
    except ValueError:
        rule = "a whole number" if kind is int else "a number"
        raise UserError(f"{option} must be {rule}, got {text!r}") from None
    if option == "ema_width":
        settings_lib.check_width(option, value)
    elif option != "seed":
        settings_lib.read_topic(settings_lib.Sampling, {option: value})  # checks it
    elif not 0 <= value <= settings_lib.MAX_SEED:
        raise UserError(f"seed must be in 0 .. {settings_lib.MAX_SEED}, got {value}")
    return value


def check(sampling, model, *, last_time):
    """UserError that names the option of a `settings.Sampling` that does not fit the model.

    model: has the fields `in_channels` and `null_label`. last_time: of the process. The rules that
    hold for every model are in `settings.Sampling`.
    """
    name, scale, interval = sampling.sampler, sampling.cfg_scale, sampling.cfg_interval
    for option, (owner, unused) in ONLY_OF.items():
        value = getattr(sampling, option)
        if value != unused and name != owner:
            raise UserError(
                f"{option} must be left at {unused} for {name}, which does not use it, got {value}"
            )
    if scale != 1 and not model.null_label:
        raise UserError(f"cfg_scale must be 1 for a model without a null label, got {scale}")
    if sampling.cfg_channels > model.in_channels:
        raise UserError(
            f"cfg_channels must be in 0 .. {model.in_channels}, got {sampling.cfg_channels}"
        )
    if sampling.cache_guidance != "none" and scale == 1:
        rule = "cache_guidance must be none without guidance, whose cfg_scale is 1"
        raise UserError(f"{rule}, got {sampling.cache_guidance}")
    if interval[0] < 0 or interval[1] > last_time:
        raise UserError(f"cfg_interval must be first <= last in 0 .. {last_time}, got {interval}")


def check_process(sampling, model, diffusion):
    """As `check`, and whether the process of a `settings.Diffusion` has such levels."""
    from dit_jax.diffusion import fields, forecasts, spacings  # need NumPy

    fields.check(diffusion)
    spacings.check(diffusion, sampling.num_steps, spacing=sampling.spacing, shift=sampling.shift)
    if fields.is_mean_flow(diffusion):
        _check_mean_flow(sampling, diffusion.process)
    for name in ("cache", "cache_guidance"):
        forecasts.read(getattr(sampling, name), spacings.count(sampling.num_steps), name=name)
    if not fields.is_path(diffusion) and sampling.sde_noise not in ("sigma", "sbdm"):
        rule = "sde_noise must be sigma or sbdm for process ddpm, which has no path"
        raise UserError(f"{rule}, got {sampling.sde_noise}")
    is_even = "," not in sampling.num_steps and sampling.spacing != "log_snr"
    unused = ONLY_OF["sde_last"][1]
    if sampling.sde_last != unused and not (fields.is_path(diffusion) and is_even):
        rule = f"sde_last must be {unused} unless a path has equal steps"
        raise UserError(f"{rule}, got {sampling.sde_last}")
    _check_omega(sampling, diffusion.process)
    check(sampling, model, last_time=fields.last_time(diffusion))


def _check_omega(sampling, process):
    """UserError for guidance as a condition of a model that has none, or outside its times."""
    first, last = sampling.omega_interval
    if first < 0 or last > 1:
        raise UserError(f"omega_interval must be first <= last in 0 .. 1, got {(first, last)}")
    for option, unused in (("omega", 1), ("omega_interval", (0, 1))):
        value = getattr(sampling, option)
        if value != unused and process != "improved_mean_flow":
            rule = f"{option} must be left at {unused} for process {process}, which does not use it"
            raise UserError(f"{rule}, got {value}")


def _check_mean_flow(sampling, process):
    """UserError for what a network of average velocities cannot do."""
    if sampling.sampler not in ("euler", "ddim"):
        rule = f"sampler must be euler or ddim for process {process}, which learns whole steps"
        raise UserError(f"{rule}, got {sampling.sampler}")
    if sampling.eta:
        raise UserError(f"eta must be 0 for process {process}, got {sampling.eta}")
    for option in ("cache", "cache_guidance"):
        if (value := getattr(sampling, option)) != "none":
            raise UserError(f"{option} must be none for process {process}, got {value}")
    if sampling.cfg_scale != 1:
        guidance = "omega" if process == "improved_mean_flow" else "learned"
        rule = f"cfg_scale must be 1 for process {process}, whose guidance is {guidance}"
        raise UserError(f"{rule}, got {sampling.cfg_scale}")


def check_calibration(wanted, num_steps, diffusion):
    """UserError unless a calibration can give what is wanted: steps, or a threshold below 1.

    num_steps: of a `settings.Sampling`, whose process is in a `settings.Diffusion`.
    """
    from dit_jax.diffusion import fields, spacings  # need NumPy

    if fields.is_mean_flow(diffusion):
        rule = f"calibrate must be left out for process {diffusion.process}, which has no cache"
        raise UserError(f"{rule}, got {wanted:g}")
    steps = spacings.count(num_steps)
    is_count = 2 <= wanted <= steps and wanted == int(wanted)
    if not (0 < wanted < 1 or is_count):
        rule = f"a number of steps in 2 .. {steps}, or a threshold above 0 and below 1"
        raise UserError(f"calibrate must be {rule}, got {wanted:g}")


def check_options(known, options):
    """As `check_process`, for the options that differ from those of a checkpoint's own config.

    Returns the `settings.Sampling` of both.
    """
    merged = vars(known.settings.sampling) | options
    sampling = settings_lib.read_topic(settings_lib.Sampling, merged)
    is_cached = (sampling.cache, sampling.cache_guidance) != ("none", "none")
    if not (is_cached or options.keys() & {"cache", "cache_guidance"}):
        for name in options.keys() & {"cache_order", "cache_fit"}:
            raise UserError(f"{name} needs a cache, as --cache=every:3, got {options[name]}")
    check_process(sampling, known.model, known.settings.diffusion)
    return sampling


def is_in_torch(sampling):
    """Whether the PyTorch code of bundles samples so: it has DDPM, DDIM and their usual steps."""
    is_usual = sampling.spacing in ("auto", "linspace") and sampling.cfg_schedule == "constant"
    is_cached = (sampling.cache, sampling.cache_guidance) != ("none", "none")
    steps = settings_lib.SPACING.fullmatch(sampling.num_steps)
    return sampling.sampler in ("ddpm", "ddim") and bool(steps) and is_usual and not is_cached


def check_vae(path, known):
    """UserError if there is no autoencoder at a path, or if it does not decode a Known's latents.

    known: None if the model cannot be looked at.
    """
    meta = peek.meta_of(path, of="vae", name="vae")
    if meta and known:
        channels = meta["vae"]["latent_channels"]
        check_decoder(path, channels, known.model.in_channels, known.settings.data.space)


def check_decoder(path, latent_channels, in_channels, space):
    """UserError if the autoencoder at a path does not decode what a model generates."""
    if space != "latents":
        raise UserError(f"vae must be none for a model of {space}, got {path}")
    if latent_channels != in_channels:
        raise UserError(f"vae must have {in_channels} latent channels, got {latent_channels}")
