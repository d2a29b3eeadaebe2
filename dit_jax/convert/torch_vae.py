"""Parameters of the autoencoder <-> the state dict of diffusers' AutoencoderKL, bit for bit.

A state dict is {name: NumPy array}, PyTorch is not needed. Older files name the attention's maps
`query, key, value, proj_attn`, and the oldest hold them as 1x1 convolutions: both are read.
"""

import re
from pathlib import Path

import jax
import numpy as np
from flax import traverse_util

from dit_jax.convert import files, torch_dit
from dit_jax.errors import UserError
from dit_jax.machine import disk
from dit_jax.models import vae

NAMES = (  # of our modules, in order: a pattern, diffusers' name
    (r"^encoder/level_(\d+)/", r"encoder.down_blocks.\1."),
    (r"^decoder/level_(\d+)/", r"decoder.up_blocks.\1."),
    (r"^encoder/downsample_(\d+)/", r"encoder.down_blocks.\1.downsamplers.0.conv."),
    (r"^decoder/upsample_(\d+)/", r"decoder.up_blocks.\1.upsamplers.0.conv."),
    (r"/middle/attention/norm/", ".mid_block.attentions.0.group_norm."),
    (r"/middle/attention/proj/", ".mid_block.attentions.0.to_out.0."),
    (r"/middle/attention/([qkv])/", r".mid_block.attentions.0.to_\1."),
    (r"/middle/", ".mid_block."),
    (r"resnet_(\d+)/", r"resnets.\1."),
    (r"/norm_out/", ".conv_norm_out."),
    (r"/", "."),
    (r"\.(kernel|scale)$", ".weight"),
)
WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
RULES = {"act_fn": "silu", "mid_block_add_attention": True}  # of the fields of a config.json
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def read(path):
    """(VAEConfig, state dict) of a folder of diffusers' AutoencoderKL, or of a file of its weights.

    The names are today's. Beside a file, a config.json is read where there is one.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"autoencoder must be a folder or a file that exists, got {path}")
    fields = disk.read_json(config_path(path))
    if path.is_dir():
        if not is_folder(path):
            raise UserError(f"autoencoder must be a folder of diffusers' AutoencoderKL, got {path}")
        weights = [path / name for name in WEIGHTS if (path / name).is_file()]
        if not weights:
            raise UserError(f"{path} must hold {' or '.join(WEIGHTS)}")
        path = weights[0]
    state_dict = rename(files.read_state_dict(path))
    return read_config(state_dict, fields), state_dict


def config_path(path):
    """Where the config.json of a folder, or of a file of weights, is if there is one."""
    path = Path(path)
    return (path if path.is_dir() else path.parent) / "config.json"


def is_folder(path):
    """Whether a folder is an AutoencoderKL of diffusers."""
    return disk.read_json(Path(path) / "config.json").get("_class_name") == "AutoencoderKL"


def download(name):
    """The folder with an AutoencoderKL of the Hugging Face hub, as stabilityai/sd-vae-ft-ema."""
    hub = files.require("huggingface_hub")
    try:
        return hub.snapshot_download(name, allow_patterns=["config.json", WEIGHTS[0]])
    except Exception as error:  # it raises a dozen types, of three packages
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"from_hub must be an autoencoder that can be downloaded, got {name}: {reason}"
        ) from error


def read_config(state_dict, fields=None):
    """The VAEConfig that a state dict's shapes and, if given, a config.json of diffusers tell.

    Without the latter the groups of a GroupNorm are 32 and the scale is Stable Diffusion's.
    """
    fields = fields or {}
    for name, rule in RULES.items():
        if fields.get(name, rule) != rule:
            raise UserError(f"{name} must be {rule}, got {fields[name]}")
    try:
        channels = _read_channels(state_dict)
        in_channels = np.shape(state_dict["encoder.conv_in.weight"])[1]
        latent_channels = np.shape(state_dict["decoder.conv_in.weight"])[1]
    except KeyError as error:
        raise UserError(f"state dict must be of an AutoencoderKL: missing {error}") from error
    resnets = {name for name in state_dict if name.startswith("encoder.down_blocks.0.resnets.")}
    config = vae.VAEConfig(
        in_channels=in_channels,
        latent_channels=latent_channels,
        channels=channels,
        num_resnets=len({name.split(".")[4] for name in resnets}),
        num_groups=fields.get("norm_num_groups", 32),
        quant_conv="quant_conv.weight" in state_dict,
        **_read_units(fields),
    )
    told = {"latent_channels": latent_channels, "block_out_channels": list(channels)}
    for name, found in told.items():
        given = fields.get(name, found)
        if (given if name == "latent_channels" else list(given)) != found:
            raise UserError(f"{name} of config.json must be {found}, got {given}")
    for name, good, rule in (
        ("channels", _divides(config), f"divisible by norm_num_groups {config.num_groups}"),
        ("scale", len(config.scale) in (1, latent_channels), "one number or one a channel"),
        ("shift", len(config.shift) in (1, latent_channels), "one number or one a channel"),
    ):
        if not good:
            raise UserError(f"{name} must be {rule}, got {getattr(config, name)}")
    return config


def _divides(config):
    groups = config.num_groups
    is_count = isinstance(groups, int) and groups >= 1
    return is_count and not any(channels % groups for channels in config.channels)


def _read_channels(state_dict):
    levels = {name.split(".")[2] for name in state_dict if name.startswith("encoder.down_blocks.")}
    names = (f"encoder.down_blocks.{i}.resnets.0.conv1.weight" for i in range(len(levels)))
    return tuple(np.shape(state_dict[name])[0] for name in names)


def _read_units(fields):
    """scale and shift of the latents, from the fields of diffusers."""
    scale = fields.get("scaling_factor", vae.LATENT_SCALE)
    shift, std = fields.get("latents_mean"), fields.get("latents_std")
    if shift and std:  # (z - mean) * scale / std
        return {"scale": tuple(scale / x for x in std), "shift": tuple(shift)}
    return {"scale": (scale,), "shift": (fields.get("shift_factor") or 0.0,)}


def rename(state_dict):
    """A state dict with today's names and shapes of the attention."""
    out = {}
    for name, x in state_dict.items():
        for old, new in OLD_NAMES.items():
            name = name.replace(f".attentions.0.{old}.", f".attentions.0.{new}.")
        out[name] = x[:, :, 0, 0] if ".attentions." in name and np.ndim(x) == 4 else x
    return out


def from_torch(state_dict, config):
    """The parameters in a state dict of diffusers: a nested dict of float32 NumPy arrays."""
    shapes = _shapes(config)
    names = {path: _name(path) for path in shapes}
    torch_dit.check_names("state dict", "the autoencoder", state_dict.keys(), set(names.values()))
    params = {}
    for path, name in names.items():
        x = np.asarray(state_dict[name], np.float32)
        expected = _to_torch(np.empty(shapes[path], np.float32)).shape
        if x.shape != expected:
            raise UserError(f"{name} must have shape {expected}, got {x.shape}")
        torch_dit.check_finite(name, x)
        params[path] = np.array(_from_torch(x), order="C")
    return traverse_util.unflatten_dict(params, sep="/")


def to_torch(params):
    """The state dict of diffusers, today's names."""
    flat = traverse_util.flatten_dict(params, sep="/")
    return {_name(path): np.array(_to_torch(np.asarray(x)), order="C") for path, x in flat.items()}


def _shapes(config):
    params = jax.eval_shape(lambda: vae.init(config, jax.random.key(0)))
    flat = traverse_util.flatten_dict(params, sep="/")
    return {path: x.shape for path, x in flat.items()}


def _name(path):
    """diffusers' name of one of our arrays."""
    for pattern, name in NAMES:
        path = re.sub(pattern, name, path)
    return path


def _from_torch(x):
    """PyTorch's layout -> ours: (out, in, h, w) -> (h, w, in, out), (out, in) -> (in, out)."""
    return x.transpose(2, 3, 1, 0) if x.ndim == 4 else x.T


def _to_torch(x):
    return x.transpose(3, 2, 0, 1) if x.ndim == 4 else x.T
