"""Finds what the official weights of a DiT predict: the noise, or the velocity as a SiT.

SiT (https://github.com/willisma/SiT) has DiT's names and shapes, so a file may not say. Its code
computes the channels of a learned variance and drops them. Its time counts from the noise, 0, to
the data, 1, and reaches the network as it is; its velocity is the derivative by that time.
"""

import re
from pathlib import Path

import numpy as np

from dit_jax.convert import files
from dit_jax.errors import UserError
from dit_jax.settings import SIT, Diffusion

PATHS = {"Linear": "linear", "GVP": "gvp"}  # SiT's names: ours
PREDICTIONS = ("velocity", "noise")


def find(path, state_dict, model):
    """Returns (a `settings.Diffusion`, what says so); (the default, "") if nothing does.

    state_dict: the official weights of a DiTConfig `model`. UserError for a SiT of another path or
    prediction than `PATHS` and `PREDICTIONS`.
    """
    args = files.read_args(path)
    if "path_type" in args:  # DiT's train.py has no such argument
        return _of_args(path, args), "by the args in the file"
    if re.match(r"sit(?![a-z])", Path(path).name, re.IGNORECASE):
        return Diffusion(**SIT), "by its name"
    if model.learn_sigma and _drops_variance(state_dict, model):
        return Diffusion(**SIT), "its variance has weights of 0"
    return Diffusion(), ""


def _of_args(path, args):
    """Returns the Diffusion of the arguments of SiT's train.py."""
    for name, known in {"path_type": PATHS, "prediction": PREDICTIONS}.items():
        if args.get(name) not in known:
            rule = " or ".join(known)
            raise UserError(f"{name} of a SiT must be {rule}, got {args.get(name)} in {path}")
    return Diffusion(
        **SIT | {"process": PATHS[args["path_type"]], "prediction": args["prediction"]}
    )


def args_of(diffusion):
    """Returns the arguments that SiT's train.py would save in a file, {} for a DiT's.

    UserError if the model is neither: no other code would use its weights rightly.
    """
    if (diffusion.process, diffusion.prediction) == ("ddpm", "noise"):
        return {}
    names = {ours: name for name, ours in PATHS.items()}
    is_sit = all(getattr(diffusion, name) == SIT[name] for name in ("time_scale", "reverse_time"))
    is_sit &= diffusion.noise_scale == 1 and diffusion.weight != "velocity"  # which is read its way
    if not (diffusion.process in names and diffusion.prediction in PREDICTIONS and is_sit):
        raise UserError(
            "process must be ddpm that predicts noise, or a path with time_scale 1 and "
            "reverse_time, as SiT's, that predicts velocity or noise, for a PyTorch file, "
            f"got a checkpoint of {diffusion.prediction} on {diffusion.process}"
        )
    return {"path_type": names[diffusion.process], "prediction": diffusion.prediction}


def _drops_variance(state_dict, model):
    """Returns True if training changed the rows of the noise, but not those of the variance."""
    weight = np.asarray(state_dict["final_layer.linear.weight"])  # (p*p*2C, D)
    rows = weight.reshape(model.patch_size**2, 2, model.in_channels, -1)
    return bool(rows[:, 0].any() and not rows[:, 1].any())
