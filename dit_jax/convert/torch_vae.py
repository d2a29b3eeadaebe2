"""Converts the autoencoder to and from the state dict of diffusers' AutoencoderKL, bit for bit.

A state dict is {name: NumPy array}; this module does not need PyTorch. Older files name the
projections of the attention `query, key, value, proj_attn`, and the oldest store them as 1x1
convolutions. Stable Diffusion's own files have other names for all. `rename` accepts all of them.
"""

import re
from pathlib import Path

import jax
import numpy as np
from flax import traverse_util

from dit_jax.convert import files, torch_dit
from dit_jax.errors import UserError
from dit_jax.machine import disk, prng
from dit_jax.models import vae

NAMES = (  # (pattern in our path, replacement), applied in order to get diffusers' name
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
RULES = {"act_fn": "silu", "mid_block_add_attention": True}  # required values in a config.json
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
PART = "first_stage_model."  # the autoencoder's names in a whole Stable Diffusion
ORIGINAL_NAMES = (  # (pattern in Stable Diffusion's name, replacement)
    (r"^encoder\.down\.(\d+)\.block\.", r"encoder.down_blocks.\1.resnets."),
    (r"^encoder\.down\.(\d+)\.downsample\.", r"encoder.down_blocks.\1.downsamplers.0."),
    (r"^decoder\.up\.(\d+)\.block\.", r"decoder.up_blocks.\1.resnets."),
    (r"^decoder\.up\.(\d+)\.upsample\.", r"decoder.up_blocks.\1.upsamplers.0."),
    (r"coder\.mid\.block_1\.", "coder.mid_block.resnets.0."),
    (r"coder\.mid\.block_2\.", "coder.mid_block.resnets.1."),
    (r"coder\.mid\.attn_1\.norm\.", "coder.mid_block.attentions.0.group_norm."),
    (r"coder\.mid\.attn_1\.([qkv])\.", r"coder.mid_block.attentions.0.to_\1."),
    (r"coder\.mid\.attn_1\.proj_out\.", "coder.mid_block.attentions.0.to_out.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"coder\.norm_out\.", "coder.conv_norm_out."),
)


def read(path):
    """Returns (VAEConfig, state dict) of the folder or the weights file of an autoencoder.

    The state dict has today's names of diffusers. A file may contain a whole Stable Diffusion.
    """
    weights, fields = find(path)
    state_dict = rename(files.read_state_dict(weights, None, part=PART))
    return read_config(state_dict, fields), state_dict


def find(path):
    """Returns (weights file, config.json) of what `read` reads. UserError if either is wrong."""
    path, fields = Path(path), read_fields(path)
    if path.is_dir():
        if not fields:
            raise UserError(f"autoencoder must be a diffusers AutoencoderKL, got {path}")
        path = files.diffusers_weights(path)
    files.parts(path)
    _check_fields(fields)
    return path, fields


def _check_fields(fields):
    for name, rule in RULES.items():
        if fields.get(name, rule) != rule:
            raise UserError(f"{name} must be {rule}, got {fields[name]}")


def read_fields(path):
    """Returns the config.json of an AutoencoderKL in a folder, or beside a file; else {}."""
    path = Path(path)
    fields = disk.read_json((path if path.is_dir() else path.parent) / "config.json")
    return fields if fields.get("_class_name") == "AutoencoderKL" else {}


def is_folder(path):
    """Returns True for the folder of a diffusers AutoencoderKL."""
    return Path(path).is_dir() and bool(read_fields(path))


def is_autoencoder(state_dict):
    """Returns True for the names of diffusers or of Stable Diffusion."""
    return "encoder.conv_in.weight" in state_dict


def has_original_names(state_dict):
    """Returns True for the names of Stable Diffusion."""
    return any(name.startswith("encoder.down.") for name in state_dict)


def download(name):
    """Downloads an AutoencoderKL, such as stabilityai/sd-vae-ft-ema; returns its folder."""
    hub = files.require("huggingface_hub")
    allowed = ["config.json", files.DIFFUSERS_WEIGHTS[0]]
    try:
        return hub.snapshot_download(name, allow_patterns=allowed)
    except Exception as error:  # a dozen types from three packages
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"from_hub must be an autoencoder that can be downloaded, got {name}: {reason}"
        ) from error


def read_config(state_dict, fields=None):
    """Infers the VAEConfig from the shapes of a state dict and the fields of a config.json.

    Without fields, GroupNorm has 32 groups and the scale is that of Stable Diffusion.
    """
    fields = fields or {}
    _check_fields(fields)
    try:
        channels = _read_channels(state_dict)
        in_channels = np.shape(state_dict["encoder.conv_in.weight"])[1]
        latent_channels = np.shape(state_dict["decoder.conv_in.weight"])[1]
    except KeyError as error:
        raise UserError(f"state dict must be an AutoencoderKL: missing {error}") from error
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
    inferred = {"latent_channels": latent_channels, "block_out_channels": list(channels)}
    for name, found in inferred.items():
        given = fields.get(name, found)
        if (given if name == "latent_channels" else list(given)) != found:
            raise UserError(f"{name} of config.json must be {found}, got {given}")
    for name, good, rule in (
        ("channels", _divides(config), f"divisible by norm_num_groups {config.num_groups}"),
        ("scale", len(config.scale) in (1, latent_channels), "one number or one for each channel"),
        ("shift", len(config.shift) in (1, latent_channels), "one number or one for each channel"),
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
    """Returns the scale and shift of the latents from the fields of diffusers."""
    scale = fields.get("scaling_factor", vae.LATENT_SCALE)
    shift, std = fields.get("latents_mean"), fields.get("latents_std")
    if shift and std:  # (z - mean) * scale / std
        return {"scale": tuple(scale / x for x in std), "shift": tuple(shift)}
    return {"scale": (scale,), "shift": (fields.get("shift_factor") or 0.0,)}


def rename(state_dict):
    """Returns a state dict with today's names of diffusers and shapes of the attention."""
    if has_original_names(state_dict):
        state_dict = _rename_original(state_dict)
    out = {}
    for name, x in state_dict.items():
        for old, new in OLD_NAMES.items():
            name = name.replace(f".attentions.0.{old}.", f".attentions.0.{new}.")
        out[name] = x[:, :, 0, 0] if ".attentions." in name and np.ndim(x) == 4 else x
    return out


def _rename_original(state_dict):
    """Gives Stable Diffusion's arrays the names of diffusers, which counts up_blocks backwards."""
    ups = [re.match(r"decoder\.up\.(\d+)\.", name) for name in state_dict]
    last = max((int(up[1]) for up in ups if up), default=0)
    out = {}
    for name, x in state_dict.items():
        if name.startswith("loss."):  # the networks of the training's loss
            continue
        for pattern, new in ORIGINAL_NAMES:
            name = re.sub(pattern, new, name)
        name = re.sub(r"(?<=up_blocks\.)\d+", lambda level: str(last - int(level[0])), name)
        out[name] = x
    return out


def from_torch(state_dict, config):
    """Converts a state dict of diffusers to a nested dict of float32 NumPy arrays."""
    shapes = _shapes(config)
    names = {path: _name(path) for path in shapes}
    torch_dit.check_names("state dict", "the autoencoder", state_dict.keys(), set(names.values()))
    params = {}
    for path, name in names.items():
        x = torch_dit.to_float32(name, state_dict[name])
        expected = _to_torch(np.empty(shapes[path], np.float32)).shape
        if x.shape != expected:
            raise UserError(f"{name} must have shape {expected}, got {x.shape}")
        params[path] = np.array(_from_torch(x), order="C")
    return traverse_util.unflatten_dict(params, sep="/")


def to_torch(params):
    """Converts our parameters to the state dict of diffusers, with today's names."""
    flat = traverse_util.flatten_dict(params, sep="/")
    return {_name(path): np.array(_to_torch(np.asarray(x)), order="C") for path, x in flat.items()}


def build_diffusers(config):
    """Returns diffusers' AutoencoderKL of a VAEConfig, with random weights."""
    levels = len(config.channels)
    return files.require("diffusers.models").AutoencoderKL(
        in_channels=config.in_channels,
        out_channels=config.in_channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=config.channels,
        layers_per_block=config.num_resnets,
        latent_channels=config.latent_channels,
        norm_num_groups=config.num_groups,
        use_quant_conv=config.quant_conv,
        use_post_quant_conv=config.quant_conv,
    )


def _shapes(config):
    params = jax.eval_shape(lambda: vae.init(config, prng.key(0)))
    flat = traverse_util.flatten_dict(params, sep="/")
    return {path: x.shape for path, x in flat.items()}


def _name(path):
    """Returns diffusers' name for one of our paths."""
    for pattern, name in NAMES:
        path = re.sub(pattern, name, path)
    return path


def _from_torch(x):
    """PyTorch's layout -> ours: (out, in, h, w) -> (h, w, in, out), (out, in) -> (in, out)."""
    return x.transpose(2, 3, 1, 0) if x.ndim == 4 else x.T


def _to_torch(x):
    return x.transpose(3, 2, 0, 1) if x.ndim == 4 else x.T
