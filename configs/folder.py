"""A small DiT on your own pictures: what dit-prepare or dit-encode made of a folder of folders.

    dit-prepare pictures data/pictures
    dit-train configs/folder.py:data/pictures runs/pictures

or, for larger pictures, on the latents of an autoencoder:

    dit-encode data/pictures data/latents --vae=runs/vae --size=256
    dit-train configs/folder.py:data/latents runs/latents \
        --config.data.vae=runs/vae

The variant is the path of the data. Its manifest.json gives the classes, the channels and the size:
pixels are trained on at most 24 x 24 (--config.model.input_size=48,48 shows more and takes four
times as long). On two cores a step takes 0.06 s, and 3,600 steps take 4 minutes: enough for the
colours and the shapes of simple pictures. For more, raise run.total_steps and train.decay_steps.
"""

import numpy as np

from configs import base
from dit_jax.errors import UserError
from dit_jax.machine import disk

MAX_PIXELS = 24  # of a side
PATCH = 6  # pixels; 24 x 24 are then 16 tokens, few enough to learn shapes in minutes
MAX_SAMPLES = 40  # in the pictures of a run


def get_config(path=""):
    config = base.get_config()
    config.data.path = str(disk.path(path)) if path else ""
    config.data.flip = False  # True doubles photos, and is wrong for letters
    config.model.size = "Ti"

    config.compute.dtype = "float32"  # bfloat16 is slower on a CPU
    config.compute.remat = "full"  # a third faster on a CPU: less memory traffic

    config.train.batch_size = 32
    config.train.learning_rate = 2e-3
    config.train.b2 = 0.99
    config.train.warmup_steps = 100
    config.train.decay_steps = 3600  # = run.total_steps
    config.train.ema_decay = 0.99

    config.sampling.sampler = "ddpm"  # its noise mends edges between patches that ddim keeps
    config.sampling.num_steps = "100"
    config.sampling.cfg_scale = 2.0
    config.sampling.cfg_channels = 0

    config.run.total_steps = 3600  # 192 epochs of 600 pictures: 192 * 600 / 32
    config.run.log_every = 100
    config.run.checkpoint_every = 1200
    config.run.sample_every = 1200
    manifest = read_manifest(path) if path else {}
    (of_latents if "vae" in manifest else of_pixels)(config, manifest)
    num_classes = config.model.num_classes
    rows = max(1, min(8, MAX_SAMPLES // num_classes))  # of a column for each class
    config.run.num_samples = min(MAX_SAMPLES, rows * num_classes)
    return config


def of_latents(config, manifest):
    """Sets what differs for latents, from the manifest of dit-encode."""
    height, width, channels = manifest["shape"][1:]  # mean and log variance
    config.model.input_size, config.model.in_channels = (height, width), channels // 2
    config.model.num_classes = manifest["num_classes"]
    config.data.source = "latents"
    config.data.split = manifest["split"]


def of_pixels(config, manifest):
    """Sets what differs for pixels, from the manifest of dit-prepare; {}: it is not given."""
    config.model.patch_size = PATCH
    config.model.in_channels = 3
    # The schedule is linear: it trains longer at high noise, where a model learns whole shapes.
    config.data.space = "pixels"
    config.sampling.clip_x0 = True
    config.model.input_size = (MAX_PIXELS, MAX_PIXELS)
    if manifest:
        config.data.split = "train" if "train" in manifest["splits"] else min(manifest["splits"])
        config.model.num_classes = len(manifest["classes"])
        size = crop_size(manifest["splits"][config.data.split]["short_sides"])
        config.model.input_size = (size, size)


def crop_size(short_sides):
    """The side that nine of ten images reach, at most MAX_PIXELS, in whole patches.

    short_sides: {pixels, as text: number of images}.
    """
    counts = sorted((int(side), count) for side, count in short_sides.items())
    smaller = np.cumsum([count for _, count in counts])  # images of at most this side
    side, _ = counts[np.searchsorted(smaller, smaller[-1] / 10, side="right")]
    return max(PATCH, min(side, MAX_PIXELS) // PATCH * PATCH)


def read_manifest(path):
    """The manifest of prepared images or of latents; UserError if the path has none."""
    manifest = disk.read_json(disk.path(path) / "manifest.json")
    if "vae" not in manifest and not manifest.get("splits"):
        raise UserError(
            "config must name what dit-prepare or dit-encode wrote, as "
            f"configs/folder.py:data/pictures, got {path}"
        )
    return manifest
