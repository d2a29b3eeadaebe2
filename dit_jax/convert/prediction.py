"""Finds what the official weights of a DiT predict: the noise, or the velocity as a SiT.

SiT (https://github.com/willisma/SiT) has DiT's names and shapes, so a file may not say. Its code
computes the channels of a learned variance and drops them.
"""

import re
from pathlib import Path

import numpy as np

from dit_jax.convert import files
from dit_jax.errors import UserError

RELEASED = {"path_type": "Linear", "prediction": "velocity"}  # args of SiT's train.py


def find(path, state_dict, model):
    """Returns ("noise" or "velocity", what says so); ("noise", "") if nothing in the file does.

    state_dict: the official weights of a DiTConfig `model`. UserError for a SiT whose args differ
    from `RELEASED`.
    """
    args = files.read_args(path)
    if "path_type" in args:  # DiT's train.py has no such argument
        for name, rule in RELEASED.items():
            if args.get(name) != rule:
                raise UserError(f"{name} of a SiT must be {rule}, got {args.get(name)} in {path}")
        return "velocity", "by the args in the file"
    if re.match(r"sit(?![a-z])", Path(path).name, re.IGNORECASE):
        return "velocity", "by its name"
    if model.learn_sigma and _drops_variance(state_dict, model):
        return "velocity", "its variance has weights of 0"
    return "noise", ""


def _drops_variance(state_dict, model):
    """Returns True if training changed the rows of the noise, but not those of the variance."""
    weight = np.asarray(state_dict["final_layer.linear.weight"])  # (p*p*2C, D)
    rows = weight.reshape(model.patch_size**2, 2, model.in_channels, -1)
    return bool(rows[:, 0].any() and not rows[:, 1].any())
