"""Checks of the settings' topic `data` that need neither the data nor jax."""

from dit_jax.checkpoint import steps
from dit_jax.errors import UserError, of_topic
from dit_jax.machine import disk

SOURCES = ("digits", "fashion", "images", "latents", "synthetic")  # as `feed.FEEDS`
STORED = ("images", "latents")  # what dit-prepare and dit-encode write, also in a bucket


def check(data):
    """UserError if the fields of a `settings.Data` do not fit together."""
    if data.source not in SOURCES:
        raise UserError(f"data.source must be one of {', '.join(SOURCES)}, got {data.source!r}")
    if data.source in STORED and not data.path:
        raise UserError(
            "data.path must be given: what dit-prepare or dit-encode wrote; "
            "or train on random data with --config.data.source=synthetic"
        )
    if data.path and data.source not in (*STORED, "fashion"):
        raise UserError(
            f"data.path must be '' for {data.source}, which reads none, got {data.path}"
        )
    if data.vae and (data.source not in STORED or data.space == "pixels"):
        raise UserError(f"data.vae must be '' where there are no latents, got {data.vae!r}")
    if data.source == "images" and data.space == "latents" and not data.vae:
        raise UserError("data.vae must be given: what `dit-convert vae` wrote")
    if data.classes and data.source != "digits":
        raise UserError(f"data.classes must be () for {data.source}, got {data.classes}")


def check_paths(data):
    """UserError unless there is something at data.path and a checkpoint at data.vae."""
    if data.path and not disk.exists(disk.path(data.path)):
        raise UserError(f"data.path must exist, got {data.path}")
    check_vae(data)


def check_vae(data):
    """UserError if data.vae is given and has no checkpoint."""
    if data.vae:
        with of_topic("data"):
            steps.locate(data.vae, name="vae")


def check_images(path, split):
    """UserError unless dit-prepare or tensorflow-datasets wrote a split to a folder on a disk."""
    info = disk.read_json(disk.path(path) / "dataset_info.json")
    if not info:
        raise UserError(
            f"dataset must be a directory written by dit-prepare or tensorflow-datasets, got {path}"
        )
    check_split(split, [each.get("name") for each in info.get("splits", [])])


def check_split(split, splits):
    if split not in splits:
        raise UserError(f"split must be one of {', '.join(splits)}, got {split!r}")


def check_size(size, factor):
    """UserError unless an autoencoder that makes latents smaller by a factor can encode a size."""
    if size % factor:
        raise UserError(f"size must be divisible by {factor}, got {size}")
