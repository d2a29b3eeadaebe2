"""Bundles: folders that sample with PyTorch alone.

A bundle contains model.safetensors, config.json, a README, and `torch_model` as dit.py.
"""

import json
import shutil
from pathlib import Path

from absl import logging

from dit_jax.convert import files, native, torch_dit
from dit_jax.errors import UserError
from dit_jax.machine import disk
from dit_jax.models import dit
from dit_jax.sampling import fields
from dit_jax.settings import to_json

DIFFUSION = ("schedule", "num_steps")  # what dit.py makes a schedule of; it predicts noise
SAMPLING = ("sampler", "num_steps", "eta", "clip_x0", "cfg_scale", "cfg_channels", "cfg_interval")
DATA = ("source", "split", "classes", "flip")  # what the data are, but not where
MODEL_FILE = Path(__file__).with_name("torch_model.py")
README = """# {name}

A Diffusion Transformer (Peebles & Xie 2023) in PyTorch. `dit.py` needs torch and safetensors.

```python
import dit
images = dit.load(".", device="cpu").sample({labels})
```

{output}.
Labels are 0 to {last}. `sample` takes these options, with the defaults of this model:
{sampling}.
From another folder, run `import sys; sys.path.insert(0, FOLDER)` first, then `dit.load(FOLDER)`.
The parameters in `model.safetensors` have the names of the official PyTorch code.
The licence of `dit.py` is Apache-2.0.
"""
OUTPUTS = {
    "pixels": "`sample` returns uint8 images (N, H, W, C)",
    "latents": "`sample` returns latents (N, C, H, W) in model units. To decode them, divide them "
    "by the latent scale of the autoencoder (0.18215 for Stable Diffusion) first",
}


def is_weights(path):
    """Returns True if a file is the model.safetensors of a bundle."""
    return Path(path).name == "model.safetensors" and Path(path).with_name("dit.py").is_file()


def read_config(path):
    """Returns (DiTConfig, settings) of a bundle. UserError if its config.json is incomplete."""
    path = Path(path)
    if not (path / "model.safetensors").is_file():
        raise UserError(f"bundle must contain model.safetensors, got {path}")
    config = disk.read_json(path / "config.json")
    try:
        model = dit.DiTConfig.from_json(config["model"])
        settings = native.settings_of_bundle(
            model,
            space=config["space"],
            diffusion=config["diffusion"],
            sampling=config["sampling"],
            data=config.get("data", {}),  # older bundles have none
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"bundle must contain the config.json of dit-convert, got {path} without {error}"
        ) from error
    return model, settings


def read_class_names(path):
    """Returns {"class_names": list} for the meta of a checkpoint; {} for labels without names."""
    config = disk.read_json(Path(path) / "config.json")
    names, count = config.get("class_names", []), config["model"]["num_classes"]
    texts = isinstance(names, list) and all(isinstance(name, str) for name in names)
    if not texts or len(names) not in (0, count):
        raise UserError(f"class_names in {path}/config.json must be {count} names, got {names!r}")
    return {"class_names": names} if names else {}


def make_config(model, settings, class_names=()):
    """Returns the config.json of a bundle: architecture, sampling, data, names of the labels."""
    return {
        "model": torch_dit.fields(model),
        "diffusion": {name: getattr(settings.diffusion, name) for name in DIFFUSION},
        "sampling": _sampling(settings),
        "space": settings.data.space,
        "data": {name: to_json(settings.data)[name] for name in DATA},
        "class_names": list(class_names),
    }


def _sampling(settings):
    """Returns the options that dit.py has; DDIM with 50 steps if it cannot sample as they say."""
    sampling = settings.sampling
    options = {name: to_json(sampling)[name] for name in SAMPLING}
    if not fields.is_in_torch(sampling):
        steps = str(min(50, settings.diffusion.num_steps))
        logging.warning("dit.py of a bundle cannot sample as the run: it takes ddim, %s", steps)
        options |= {"sampler": "ddim", "num_steps": steps, "eta": 0.0}
    return options


def write(path, state_dict, model, settings, class_names=()):
    """Writes a bundle from an official state dict, a DiTConfig and settings.

    class_names: the name of label 0, 1, ...; () if the labels have none.
    """
    path = Path(path)
    path.mkdir()
    files.write_state_dict(path / "model.safetensors", state_dict)
    config = make_config(model, settings, class_names)
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    shutil.copy(MODEL_FILE, path / "dit.py")
    readme = README.format(
        name=f"DiT, {model.depth} blocks of {model.hidden_size}, patch {model.patch_size}",
        labels=[i % model.num_classes for i in (3, 1, 4)],
        last=model.num_classes - 1,
        output=OUTPUTS[config["space"]],
        sampling=", ".join(f"{name}={value!r}" for name, value in config["sampling"].items()),
    )
    (path / "README.md").write_text(readme)
