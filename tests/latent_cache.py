"""Writes caches of latents, like dit-encode, from random moments; copies folders to a bucket."""

import numpy as np

from dit_jax.data import latents
from dit_jax.models import vae


def write(out, *, seed=0, count=40, shape=(8, 8, 1), num_classes=10, examples_per_shard=8):
    """Writes a finished cache; shape: of a latent. It fits configs/digits.py by default."""
    height, width, channels = shape
    config = vae.VAEConfig(latent_channels=channels, scale=(1.0,))._asdict()
    plan = {
        "vae": {k: list(v) if isinstance(v, tuple) else v for k, v in config.items()},
        "vae_digests": {"['encoder']": "0"},
        **{"split": "train", "size": 8 * height, "dtype": "float16"},
        **{"examples_per_shard": examples_per_shard, "num_examples": count},
        **{"num_classes": num_classes, "shape": [2, height, width, 2 * channels]},
    }
    out.mkdir()
    latents.claim(out, plan)
    moments = np.random.default_rng(seed).standard_normal((count, *plan["shape"]))
    ranges = latents.shard_ranges(count, examples_per_shard)
    for name, indices in ranges.items():
        examples = [(i % num_classes, moments[i]) for i in indices]
        latents.write_shard(out, name, examples, plan["dtype"])
    latents.finish(out, plan, ranges, [f"class {i}" for i in range(num_classes)])
    return out


def upload(folder, path):
    """Copies the files of a folder to a path in a bucket, which it returns."""
    for file in folder.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    return path
