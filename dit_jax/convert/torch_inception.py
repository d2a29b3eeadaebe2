"""Converts the weights file of pytorch-fid and torch-fidelity to the parameters of our Inception.

Both projects publish the same file. A state dict is {name: NumPy array}; a convolution NAME has
`NAME.conv.weight` (out, in, height, width) and `NAME.bn.*`, a batch norm with fixed statistics,
which becomes part of the convolution here.
"""

import functools
from pathlib import Path

import jax
import numpy as np
from flax import traverse_util

from dit_jax.convert import files, torch_dit
from dit_jax.errors import UserError
from dit_jax.machine import disk
from dit_jax.models import inception

SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
URLS = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
    "weights-inception-2015-12-05-6726825d.pth",
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    "pt_inception-2015-12-05-6726825d.pth",
)
EPSILON = 1e-3  # of every batch norm
STATISTICS = ("weight", "bias", "running_mean", "running_var")  # of a batch norm


def check_file(path, *, other_weights=False):
    """Returns the sha256 of the file; UserError if it must be the published one and is not."""
    if not Path(path).is_file():
        raise UserError(f"FILE must be an existing file, got {path}: download {URLS[0]}")
    found = disk.sha256(path)
    if found != SHA256 and not other_weights:
        raise UserError(
            f"FILE must have the sha256 {SHA256} of {URLS[0]}, got {found}: pass --other_weights "
            "to convert it all the same; its scores are not FID"
        )
    return found


def is_inception(state_dict):
    """Returns True for the names of Inception's state dict."""
    return "Mixed_7c.branch_pool.conv.weight" in state_dict


def read(path):
    """Returns the state dict of a weights file, without the counters of its batch norms."""
    state_dict = files.read_state_dict(path, None)
    return {name: x for name, x in state_dict.items() if not name.endswith(".num_batches_tracked")}


def from_torch(state_dict):
    """Converts a state dict to a nested dict of float32 NumPy arrays."""
    _check(state_dict)
    float32 = {name: torch_dit.to_float32(name, x) for name, x in state_dict.items()}
    params = {"fc/kernel": np.array(float32["fc.weight"].T, order="C")}
    for name in _convolutions():
        weight = float32[f"{name}.conv.weight"].astype(np.float64)
        scale, bias, mean, variance = (
            float32[f"{name}.bn.{part}"].astype(np.float64) for part in STATISTICS
        )
        if variance.min() + EPSILON <= 0:
            raise UserError(f"{name}.bn.running_var must be positive, got {variance.min()}")
        scale = scale / np.sqrt(variance + EPSILON)
        path = name.replace(".", "/")
        kernel = (weight * scale[:, None, None, None]).transpose(2, 3, 1, 0)  # (h, w, in, out)
        params[f"{path}/kernel"] = np.array(kernel, np.float32, order="C")
        params[f"{path}/bias"] = np.float32(bias - mean * scale)
    return traverse_util.unflatten_dict(params, sep="/")


def shapes():
    """Returns {name: shape} of the published state dict, without counters."""
    out = {
        "fc.weight": (inception.NUM_LOGITS, inception.NUM_FEATURES),
        "fc.bias": (inception.NUM_LOGITS,),  # unused: the Inception Score leaves it out
    }
    for name, (height, width, ins, outs) in _convolutions().items():
        out[f"{name}.conv.weight"] = (outs, ins, height, width)
        out |= {f"{name}.bn.{part}": (outs,) for part in STATISTICS}
    return out


@functools.cache
def _convolutions():
    """Returns {PyTorch's name: shape of our kernel} of every convolution."""
    params = traverse_util.flatten_dict(jax.eval_shape(inception.init), sep="/")
    return {
        path.removesuffix("/kernel").replace("/", "."): x.shape
        for path, x in params.items()
        if path.endswith("/kernel") and x.ndim == 4
    }


def _check(state_dict):
    expected = shapes()
    torch_dit.check_names("state dict", "Inception", state_dict.keys(), expected.keys())
    for name, shape in expected.items():
        if np.shape(state_dict[name]) != shape:
            raise UserError(f"{name} must have shape {shape}, got {np.shape(state_dict[name])}")
