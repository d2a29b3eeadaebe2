"""Describes any checkpoint that dit-convert can read: format, variant, shapes, step, sets."""

from pathlib import Path

import jax

from dit_jax.convert import (
    bundle,
    diffusers_dit,
    files,
    native,
    prediction,
    torch_dit,
    torch_inception,
    torch_vae,
)
from dit_jax.diffusion.fields import shown
from dit_jax.errors import UserError
from dit_jax.machine import disk, prng
from dit_jax.models import dit, inception, vae
from dit_jax.sampling import autoencoder, extractor


def describe(path, *, num_heads=0, num_classes=0):
    """Returns {name: value} for a file or a folder.

    num_heads, num_classes: for a state dict, which may not determine them; 0: infer.
    """
    path = Path(path)
    if path.is_file():
        return _of_state_dict(path, num_heads, num_classes)
    if (path / "dit.py").is_file():
        return _of_bundle(path)
    if torch_vae.is_folder(path):
        config, _ = torch_vae.read(path)
        return {"format": "autoencoder of diffusers", **_of_vae(config)}
    if diffusers_dit.is_folder(path):
        _, model, settings = diffusers_dit.read_folder(path)
        return {"format": "diffusers", **shown(settings.diffusion), **_of_dit(model)}
    kind = native.kind(path)
    if kind == "vae":
        return {"format": "autoencoder of dit_jax", **_of_vae(autoencoder.describe(path))}
    if kind == "inception":
        return {"format": "Inception of dit_jax", **extractor.describe(path), **_of_inception()}
    if kind == "model":
        model, settings, step, items = native.describe(path)
        fields = {"format": "dit_jax", "step": step, "sets": ", ".join(items)}
        return fields | _of_data(settings) | shown(settings.diffusion) | _of_dit(model)
    raise UserError(
        "FILE_OR_DIR must be a state dict, a run, a converted checkpoint, a bundle or a diffusers "
        f"folder, got {path}"
    )


def count_parameters(model):
    """Returns the number of parameters of a DiTConfig, as text."""
    return _count(lambda: dit.init(model, prng.key(0)))


def _of_data(settings):
    return {"source": settings.data.source, "space": settings.data.space}


def _of_dit(model):
    return {"variant": model.name, **model.to_json(), "parameters": count_parameters(model)}


def _of_vae(config):
    return {**config._asdict(), "parameters": _count(lambda: vae.init(config, prng.key(0)))}


def _of_inception():
    return {"parameters": _count(inception.init)}


def _count(init):
    return f"{sum(x.size for x in jax.tree.leaves(jax.eval_shape(init))):,}"


def _of_bundle(path):
    model, settings = bundle.read_config(path)
    state_dict = files.read_state_dict(path / "model.safetensors")
    found = torch_dit.read_config(
        state_dict, num_heads=model.num_heads, num_classes=model.num_classes
    )
    if found != model:
        raise UserError(f"config.json must match the model.safetensors of its folder, got {path}")
    fields = {"format": "bundle for PyTorch", **_of_data(settings), **shown(settings.diffusion)}
    return fields | _of_dit(model)


def _of_state_dict(path, num_heads, num_classes):
    files.parts(path)  # a UserError before the file is read
    sets = ", ".join(files.groups(path)) or "one (the file does not record whether it is the EMA)"
    state_dict = files.read_state_dict(path, None, part=torch_vae.PART)
    end = "sharded" if path.name.endswith(files.INDEX) else path.suffix
    dtype = ", ".join(sorted({str(x.dtype) for x in state_dict.values()}))
    if torch_vae.is_autoencoder(state_dict):
        whose = "Stable Diffusion" if torch_vae.has_original_names(state_dict) else "diffusers"
        config = torch_vae.read_config(torch_vae.rename(state_dict), torch_vae.read_fields(path))
        name = f"autoencoder with the names of {whose} ({end})"
        return {"format": name, "dtype": dtype, **_of_vae(config)}
    if torch_inception.is_inception(state_dict):
        published = disk.sha256(path) == torch_inception.SHA256
        fields = {"format": f"Inception of pytorch-fid ({end})", "published": published}
        return {**fields, "dtype": dtype, **_of_inception()}
    model = torch_dit.read_config(state_dict, num_heads=num_heads, num_classes=num_classes)
    found, evidence = prediction.find(path, state_dict, model)
    fields = {
        "format": f"official state dict ({end})",
        "sets": sets,
        "dtype": dtype,
        **(shown(found) if evidence else {}),
        "prediction": f"{found.prediction} ({evidence or 'not recorded: assumed'})",
    }
    return fields | _of_dit(model)
