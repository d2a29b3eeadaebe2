"""What is this? Format, variant, shapes, step and sets of any checkpoint that dit-convert knows."""

from pathlib import Path

import jax

from dit_jax.convert import bundle, diffusers_dit, files, native, torch_dit, torch_vae
from dit_jax.errors import UserError
from dit_jax.models import dit, vae
from dit_jax.sampling import autoencoder


def describe(path, **known):
    """{name: value} of a file or a folder. known: num_heads and num_classes of a state dict."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"FILE_OR_DIR must exist, got {path}")
    if path.is_file():
        return _of_state_dict(path, known)
    if (path / "dit.py").is_file():
        return _of_bundle(path)
    if torch_vae.is_folder(path):
        config, _ = torch_vae.read(path)
        return {"format": "autoencoder of diffusers", **_of_vae(config)}
    if diffusers_dit.is_folder(path):
        _, model, settings = diffusers_dit.read_folder(path)
        return {"format": "diffusers", **settings["diffusion"], **_of_dit(model)}
    kind = native.kind(path)
    if kind == "vae":
        return {"format": "autoencoder of dit_jax", **_of_vae(autoencoder.describe(path))}
    if kind == "model":
        model, settings, step, items = native.describe(path)
        what = {"format": "dit_jax", "step": step, "sets": ", ".join(items)}
        return what | settings["data"] | settings["diffusion"] | _of_dit(model)
    raise UserError(
        "FILE_OR_DIR must be a state dict, a run, a converted checkpoint, a bundle or a folder of "
        f"diffusers, got {path}"
    )


def variant(model):
    """A DiTConfig in words, as "XL/2"."""
    names = {size: name for name, size in dit.SIZES.items()}
    own = f"{model.depth} blocks of {model.hidden_size}"
    size = names.get((model.depth, model.hidden_size, model.num_heads), own)
    return f"{size}/{model.patch_size}"


def _of_dit(model):
    count = _count(lambda: dit.init(model, jax.random.key(0)))
    return {"variant": variant(model), **model._asdict(), "parameters": count}


def _of_vae(config):
    return {**config._asdict(), "parameters": _count(lambda: vae.init(config, jax.random.key(0)))}


def _count(init):
    return f"{sum(x.size for x in jax.tree.leaves(jax.eval_shape(init))):,}"


def _of_bundle(path):
    model, settings = bundle.read_config(path)
    state_dict = files.read_state_dict(path / "model.safetensors")
    known = {"num_heads": model.num_heads, "num_classes": model.num_classes}
    if torch_dit.read_config(state_dict, **known) != model:
        raise UserError(f"config.json must be that of the model.safetensors beside it, got {path}")
    what = {"format": "bundle for PyTorch", **settings["data"], **settings["diffusion"]}
    return what | _of_dit(model)


def _of_state_dict(path, known):
    files.check_suffix(path)
    groups = files.groups(path)
    state_dict = files.read_state_dict(path, groups[0] if groups else "ema")
    what = {
        "format": f"official state dict ({path.suffix})",
        "sets": ", ".join(groups) or "one, whether averaged or not it does not say",
        "dtype": ", ".join(sorted({str(x.dtype) for x in state_dict.values()})),
    }
    return what | _of_dit(torch_dit.read_config(state_dict, **known))
