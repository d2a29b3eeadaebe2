"""Converts between the official state dict of a DiT and diffusers' folder, in both directions.

A state dict is {name: NumPy array}; see `torch_dit` for the official one. A folder is what
`DiTPipeline.from_pretrained` opens: the pipeline, or its transformer alone. This module does not
need diffusers; `diffusers_pipeline` does.
"""

import json
import math
import shutil
from pathlib import Path

import numpy as np
from absl import logging

from dit_jax.convert import class_names, files, native, torch_dit, torch_vae
from dit_jax.errors import UserError
from dit_jax.machine import disk
from dit_jax.models import dit, layers
from dit_jax.settings import Diffusion

MODULES = {  # official name: diffusers' name; * is the index of the block
    "x_embedder.proj": "pos_embed.proj",
    "blocks.*.attn.proj": "transformer_blocks.*.attn1.to_out.0",
    "blocks.*.mlp.fc1": "transformer_blocks.*.ff.net.0.proj",
    "blocks.*.mlp.fc2": "transformer_blocks.*.ff.net.2",
    "blocks.*.adaLN_modulation.1": "transformer_blocks.*.norm1.linear",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
EMBEDDERS = {  # official name: diffusers' name; every diffusers block has a copy
    "t_embedder.mlp.0.weight": "timestep_embedder.linear_1.weight",
    "t_embedder.mlp.0.bias": "timestep_embedder.linear_1.bias",
    "t_embedder.mlp.2.weight": "timestep_embedder.linear_2.weight",
    "t_embedder.mlp.2.bias": "timestep_embedder.linear_2.bias",
    "y_embedder.embedding_table.weight": "class_embedder.embedding_table.weight",
}
QKV = ("to_q", "to_k", "to_v")
SCHEDULES = {"linear": "linear", "squared_cosine": "squaredcos_cap_v2"}
CLASSES = ("DiTTransformer2DModel", "Transformer2DModel")  # the second before diffusers 0.28
RULES = {  # the diffusers options that make a DiT
    "norm_type": "ada_norm_zero",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "norm_elementwise_affine": False,
}


def check(model):
    """UserError if diffusers cannot represent a DiTConfig."""
    torch_dit.check(model)
    height, _ = model.input_size
    for name, value, rule in (
        ("conditioning", model.conditioning, "adaln_zero"),
        ("input_size", model.input_size, (height, height)),
        ("null_label", model.null_label, True),
    ):
        if value != rule:
            raise UserError(f"{name} must be {rule} for diffusers, got {value}")


def to_diffusers(state_dict, model):
    """Converts to the state dict of a `DiTTransformer2DModel`. Empties the official one."""
    check(model)
    out = {}
    state_dict.pop("pos_embed")  # diffusers makes the same table
    for official, name in EMBEDDERS.items():
        x = state_dict.pop(official)
        out |= dict.fromkeys(_copies(name, model.depth), x)
    for official, parts in _attention(model.depth):
        out |= dict(zip(parts, np.split(state_dict.pop(official), 3), strict=True))
    for official, name in _pairs(model.depth):
        out[name] = state_dict.pop(official)
    return out


def from_diffusers(state_dict, model):
    """Converts to the official state dict. Empties the one of the `DiTTransformer2DModel`."""
    shape = (extent // model.patch_size for extent in model.input_size)
    out = {"pos_embed": layers.position_table(tuple(shape), model.hidden_size)[None]}
    state_dict.pop("pos_embed.pos_embed", None)
    _check_fit(state_dict, model)
    for official, name in EMBEDDERS.items():
        copies = [state_dict.pop(copy) for copy in _copies(name, model.depth)]
        for i, x in enumerate(copies):
            if not np.array_equal(x, copies[0]):
                raise UserError(
                    f"{name} must be equal in all blocks, got a different copy in block {i}"
                )
        out[official] = copies[0]
    for official, parts in _attention(model.depth):
        out[official] = np.concatenate([state_dict.pop(name) for name in parts])
    for official, name in _pairs(model.depth):
        out[official] = state_dict.pop(name)
    return out


def _check_fit(state_dict, model):
    """UserError unless the weights have the names and shapes of the config."""
    blocks = {name.split(".")[1] for name in state_dict if name.startswith("transformer_blocks.")}
    if len(blocks) != model.depth:
        raise UserError(f"num_layers must be {len(blocks)}, as in the weights, got {model.depth}")
    names = {copy for name in EMBEDDERS.values() for copy in _copies(name, model.depth)}
    names |= {name for _, parts in _attention(model.depth) for name in parts}
    names |= {name for _, name in _pairs(model.depth)}
    torch_dit.check_names("transformer", "a DiT of diffusers", state_dict.keys(), names)
    patches = state_dict["pos_embed.proj.weight"].shape  # (D, C, p, p)
    table = next(_copies(EMBEDDERS["y_embedder.embedding_table.weight"], model.depth))
    for name, value, found in (
        ("num_attention_heads x attention_head_dim", model.hidden_size, patches[0]),
        ("in_channels", model.in_channels, patches[1]),
        ("patch_size", model.patch_size, patches[-1]),
        ("num_embeds_ada_norm", model.num_classes, len(state_dict[table]) - 1),
        (
            "out_channels",
            model.out_channels,
            len(state_dict["proj_out_2.bias"]) // patches[-1] ** 2,
        ),
    ):
        if value != found:
            raise UserError(f"{name} must be {found}, as in the weights, got {value}")


def _copies(name, depth):
    """Yields diffusers' names of an embedder array, one for each block."""
    return (f"transformer_blocks.{i}.norm1.emb.{name}" for i in range(depth))


def _attention(depth):
    """Yields (official name, diffusers' three names) of every q, k, v array."""
    for i in range(depth):
        for kind in ("weight", "bias"):
            parts = [f"transformer_blocks.{i}.attn1.{part}.{kind}" for part in QKV]
            yield f"blocks.{i}.attn.qkv.{kind}", parts


def _pairs(depth):
    """Yields (official name, diffusers' name) of every array that is only renamed."""
    for official, name in MODULES.items():
        blocks = range(depth) if "*" in official else [None]
        for i in blocks:
            for kind in ("weight", "bias"):
                yield (f"{s}.{kind}".replace("*", str(i)) for s in (official, name))


def write_folder(path, state_dict, model, settings, vae=None, names=()):
    """Writes a pipeline folder.

    vae: the folder of an AutoencoderKL to copy into it, or None. names: the name of label 0, 1,
    ...; () if the labels have none.
    """
    path = Path(path)
    (path / "transformer").mkdir(parents=True)
    (path / "scheduler").mkdir()
    arrays = to_diffusers(state_dict, model)
    files.write_state_dict(path / "transformer" / files.DIFFUSERS_WEIGHTS[0], arrays)
    _write(path / "transformer" / "config.json", _transformer_config(model))
    _write(path / "scheduler" / "scheduler_config.json", _scheduler_config(settings))
    if vae:
        shutil.copytree(vae, path / "vae")
    texts = class_names.for_pipeline(names, model.num_classes)
    index = {
        "_class_name": "DiTPipeline",
        "id2label": {str(i): text for i, text in enumerate(texts)},
        "scheduler": ["diffusers", "DDIMScheduler"],
        "transformer": ["diffusers", "DiTTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"] if vae else [None, None],
    }
    _write(path / "model_index.json", index)


def check_vae(path, model):
    """UserError unless a folder is an AutoencoderKL with the latent channels of the model."""
    if not torch_vae.is_folder(path):
        raise UserError(f"vae must be the folder of a diffusers AutoencoderKL, got {path}")
    channels = torch_vae.read(path)[0].latent_channels
    if channels != model.in_channels:
        raise UserError(f"vae must have {model.in_channels} latent channels, got {channels}")


def is_folder(path):
    """Returns True for the folder of a diffusers pipeline or of its transformer."""
    has_weights = any((path / name).is_file() for name in files.DIFFUSERS_WEIGHTS)
    return (path / "transformer").is_dir() or has_weights


def read_folder(path, *, space="latents"):
    """Returns (official state dict, DiTConfig, settings) of a pipeline or transformer folder."""
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"DIR must be an existing folder, got {path}")
    transformer = path / "transformer" if (path / "transformer").is_dir() else path
    config = disk.read_json(transformer / "config.json")
    if config.get("_class_name") not in CLASSES:
        found = config.get("_class_name", "no config.json of a model")
        raise UserError(f"folder must contain a diffusers DiT, got {found} in {transformer}")
    weights = files.diffusers_weights(transformer)
    scheduler = disk.read_json(path / "scheduler" / "scheduler_config.json")
    try:
        model = _read_config(config)
        diffusion = read_diffusion(scheduler) if scheduler else {}
        if not scheduler:
            logging.info("no scheduler in %s: assuming a linear schedule of 1000 steps", path)
        settings = native.settings_of(model, space=space, diffusion=Diffusion(**diffusion))
    except KeyError as error:
        raise UserError(f"{path} must have {error} in its JSON files") from error
    logging.info("reading %s", path)
    state_dict = files.read_state_dict(weights)
    return from_diffusers(state_dict, model), model, settings


def read_diffusion(scheduler):
    """Returns {"schedule", "num_steps"} of a scheduler config. UserError if it is not DiT's."""
    names = {name: ours for ours, name in SCHEDULES.items()}
    schedule, num_steps = scheduler["beta_schedule"], _read_whole(scheduler, "num_train_timesteps")
    if schedule not in list(names):
        raise UserError(f"beta_schedule must be one of {', '.join(names)}, got {schedule}")
    rules = {"prediction_type": "epsilon", "trained_betas": None, "rescale_betas_zero_snr": False}
    if schedule == "linear":
        rules |= _betas(num_steps)
    for name, rule in rules.items():
        value = scheduler.get(name, rule)
        if value != rule and not (isinstance(rule, float) and math.isclose(value, rule)):
            raise UserError(f"{name} must be {rule} in a DiT, got {value}")
    return {"schedule": names[schedule], "num_steps": num_steps}


def _betas(num_steps):
    """Returns the ends of our linear schedule, which scale with the number of steps."""
    return {"beta_start": 1e-4 * 1000 / num_steps, "beta_end": 0.02 * 1000 / num_steps}


def _read_config(config):
    for name, rule in RULES.items():
        if config.get(name, rule) != rule:
            raise UserError(f"{name} must be {rule} in a DiT, got {config[name]}")
    height, patch, channels, depth, heads, width, classes, outputs = (
        _read_whole(config, name)
        for name in (
            *("sample_size", "patch_size", "in_channels", "num_layers", "num_attention_heads"),
            *("attention_head_dim", "num_embeds_ada_norm", "out_channels"),
        )
    )
    if outputs not in (channels, 2 * channels):
        raise UserError(f"out_channels must be {channels} or {2 * channels}, got {outputs}")
    if height % patch:
        raise UserError(f"sample_size must be divisible by patch_size {patch}, got {height}")
    return dit.DiTConfig(
        input_size=(height, height),
        patch_size=patch,
        in_channels=channels,
        depth=depth,
        hidden_size=heads * width,
        num_heads=heads,
        num_classes=classes,
        null_label=True,
        learn_sigma=outputs == 2 * channels,
        conditioning="adaln_zero",
    )


def _read_whole(config, name):
    if type(config[name]) is not int or config[name] < 1:
        raise UserError(f"{name} must be an integer of at least 1, got {config[name]!r}")
    return config[name]


def _transformer_config(model):
    return {
        "_class_name": "DiTTransformer2DModel",
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "attention_head_dim": model.hidden_size // model.num_heads,
        "in_channels": model.in_channels,
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,  # DiT's value; the default of diffusers is 1e-5
        "norm_type": "ada_norm_zero",
        "num_attention_heads": model.num_heads,
        "num_embeds_ada_norm": model.num_classes,
        "num_layers": model.depth,
        "out_channels": model.out_channels,
        "patch_size": model.patch_size,
        "sample_size": model.input_size[0],
    }


def _scheduler_config(settings):
    diffusion = settings.diffusion
    return {
        "_class_name": "DDIMScheduler",
        **_betas(diffusion.num_steps),
        "beta_schedule": SCHEDULES[diffusion.schedule],
        "clip_sample": settings.sampling.clip_x0,
        "num_train_timesteps": diffusion.num_steps,
        "prediction_type": "epsilon",
        "set_alpha_to_one": True,
        "steps_offset": 0,
    }


def _write(path, content):
    path.write_text(json.dumps(content, indent=2) + "\n")
