"""Builds what feeds the training step from the settings' topic `data`.

To add a data set, write its source (`__len__`, `__getitem__` -> {"image" or "x0", "label"}) and a
function here that returns a Feed, and list it in `FEEDS`. A value that does not fit is a UserError
that names its field.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax

from dit_jax.data import digits, latents, prepared, synthetic
from dit_jax.errors import UserError
from dit_jax.models import vae
from dit_jax.sampling import autoencoder


class Feed(NamedTuple):
    """The source of examples, the per-example augmentation and the preprocessing of a batch."""

    source: Sequence  # of dicts of NumPy arrays, with random access
    augment: Callable | None  # (example, rng) -> example
    prepare: Callable  # batch on the devices -> {"image", "x0" or "posterior"; "label"}
    decoder: autoencoder.Autoencoder | None = None  # makes images of latents
    vae_digests: dict | None = None  # of the autoencoder that encoded the latents


def make(settings, mesh=None):
    """The Feed of Settings; mesh: the devices on which an autoencoder runs."""
    data = settings.data
    if data.source not in FEEDS:
        raise UserError(f"data.source must be one of {', '.join(FEEDS)}, got {data.source!r}")
    if data.source in ("images", "latents") and not data.path:
        raise UserError(
            "data.path must be given: what dit-prepare or dit-encode wrote; "
            "or train on random latents with --config.data.source=synthetic"
        )
    if "://" in data.path:
        raise UserError(f"data.path must be on a disk, got {data.path}: mount the bucket")
    if data.vae and (data.source not in ("images", "latents") or data.space == "pixels"):
        raise UserError(f"data.vae must be '' where there are no latents, got {data.vae!r}")
    if data.classes and data.source != "digits":
        raise UserError(f"data.classes must be () for {data.source}, got {data.classes}")
    return FEEDS[data.source](settings, mesh)


def _of_digits(settings, mesh):
    classes = settings.data.classes
    if len(set(classes)) < len(classes) or max(classes, default=0) >= digits.NUM_CLASSES:
        last = digits.NUM_CLASSES - 1
        raise UserError(f"data.classes must be different digits in 0 .. {last}, got {classes}")
    train, _ = digits.load(classes)
    _check(
        settings,
        input_size_and_channels=train.image.shape[1:],
        num_classes=len(classes) or digits.NUM_CLASSES,
        space="pixels",
    )
    return Feed(train, prepared.flip_at_random if settings.data.flip else None, _same)


def _of_synthetic(settings, mesh):
    model = settings.model
    shape = (*model.input_size, model.in_channels)
    return Feed(synthetic.Synthetic(shape, model.num_classes), None, _same)


def _of_images(settings, mesh):
    data, model = settings.data, settings.model
    encoder = _load_vae(settings, mesh) if data.space == "latents" else None
    factor = encoder.config.downsampling if encoder else 1
    size = model.input_size[0] * factor
    source = prepared.open_images(data.path, data.split, size)
    channels = model.in_channels if encoder else 3
    _check(
        settings,
        input_size_and_channels=(size // factor, size // factor, channels),
        num_classes=source.num_classes,
    )
    prepared.warn_of_small(source)
    augment = prepared.flip_at_random if data.flip else None
    if not encoder:
        return Feed(source, augment, _same)
    return Feed(source, augment, encoder.encode_batch, encoder, autoencoder.read_digests(data.vae))


def _of_latents(settings, mesh):
    data = settings.data
    source = latents.open_latents(data.path)
    config = vae.VAEConfig.from_json(source.vae)
    height, width, channels = source.shape[1:]
    _check(
        settings,
        input_size_and_channels=(height, width, channels // 2),
        num_classes=source.num_classes,
        space="latents",
    )
    if data.split != source.split:
        raise UserError(f"data.split must be {source.split}, as in {data.path}, got {data.split}")
    digests = latents.read_manifest(data.path)["vae_digests"]
    if data.vae and not autoencoder.encodes_alike(digests, autoencoder.read_digests(data.vae)):
        raise UserError(f"data.vae must be the one that encoded {data.path}, got {data.vae}")
    decoder = _load_vae(settings, mesh) if data.vae else None

    @jax.jit
    def prepare(batch):
        posterior = vae.moments_to_model_units(batch["moments"], config)
        return {"posterior": posterior, "label": batch["label"]}

    augment = latents.pick_at_random if data.flip else latents.pick_first
    return Feed(source, augment, prepare, decoder, digests)


FEEDS = {
    "digits": _of_digits,
    "images": _of_images,
    "latents": _of_latents,
    "synthetic": _of_synthetic,
}


def _same(batch):
    return batch


def _load_vae(settings, mesh):
    data, model = settings.data, settings.model
    if not data.vae:
        raise UserError("data.vae must be given: what `dit-convert vae` wrote")
    loaded = autoencoder.load(data.vae, dtype=data.vae_dtype, mesh=mesh)
    channels = loaded.config.latent_channels
    if channels != model.in_channels:
        raise UserError(f"data.vae must have {model.in_channels} latent channels, got {channels}")
    return loaded


def _check(settings, *, input_size_and_channels, num_classes, space=None):
    """UserError if the model does not fit the data set."""
    model, data = settings.model, settings.data
    shape = (*model.input_size, model.in_channels)
    for name, value, rule in (
        ("model.input_size and in_channels", shape, tuple(input_size_and_channels)),
        ("model.num_classes", model.num_classes, num_classes),
        ("data.space", data.space, space or data.space),
    ):
        if value != rule:
            raise UserError(f"{name} must be {rule} for {data.source}, got {value}")
