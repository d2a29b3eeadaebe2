"""From a config's topic `data` to what a training step is fed with.

A value that does not fit is a UserError that names its field.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax

from dit_jax.data import digits, latents, prepared, synthetic
from dit_jax.errors import UserError
from dit_jax.models import layers, vae
from dit_jax.sampling import autoencoder


class Feed(NamedTuple):
    """Examples, what changes each of them, and what makes a batch that of a step."""

    source: Sequence  # of dicts, read at random
    augment: Callable | None  # (example, rng) -> example
    prepare: Callable  # (batch on the devices) -> {"image" or "moments", "label"}
    decoder: autoencoder.Autoencoder | None = None  # that shows latents
    vae_digests: dict | None = None  # of the autoencoder that encoded


def make(config, mesh=None):
    """The Feed of a config; mesh: of the devices that an autoencoder works on."""
    kind = config.data.source
    if kind not in FEEDS:
        raise UserError(f"data.source must be one of {', '.join(FEEDS)}, got {kind!r}")
    if kind in ("images", "latents") and not config.data.path:
        raise UserError(
            "data.path must be given: what dit-prepare or dit-encode wrote; "
            "or train on random latents with --config.data.source=synthetic"
        )
    if "://" in config.data.path:
        raise UserError(f"data.path must be on a disk, got {config.data.path}: mount the bucket")
    if config.data.vae and (kind not in ("images", "latents") or config.data.space == "pixels"):
        raise UserError(f"data.vae must be '' where there are no latents, got {config.data.vae!r}")
    return FEEDS[kind](config, mesh)


def _of_digits(config, mesh):
    train, _ = digits.load()
    _check(
        config,
        input_size_and_channels=train.image.shape[1:],
        num_classes=digits.NUM_CLASSES,
        space="pixels",
    )
    return Feed(train, prepared.flip_at_random if config.data.flip else None, _same)


def _of_synthetic(config, mesh):
    model = config.model
    shape = (*model.input_size, model.in_channels)
    return Feed(synthetic.Synthetic(shape, model.num_classes), None, _same)


def _of_images(config, mesh):
    data, model = config.data, config.model
    encoder = _load_vae(config, mesh) if data.space == "latents" else None
    factor = encoder.config.downsampling if encoder else 1
    size = model.input_size[0] * factor
    source = prepared.open_images(data.path, data.split, size)
    channels = model.in_channels if encoder else 3
    _check(
        config,
        input_size_and_channels=(size // factor, size // factor, channels),
        num_classes=source.num_classes,
    )
    prepared.warn_of_small(source)
    augment = prepared.flip_at_random if data.flip else None
    if not encoder:
        return Feed(source, augment, _same)
    return Feed(source, augment, encoder.encode_batch, encoder, autoencoder.read_digests(data.vae))


def _of_latents(config, mesh):
    data = config.data
    source = latents.open_latents(data.path)
    units = vae.VAEConfig.from_json(source.vae)
    height, width, channels = source.shape[1:]
    _check(
        config,
        input_size_and_channels=(height, width, channels // 2),
        num_classes=source.num_classes,
        space="latents",
    )
    if data.split != source.split:
        raise UserError(f"data.split must be {source.split}, that of {data.path}, got {data.split}")
    digests = latents.read_manifest(data.path)["vae_digests"]
    if data.vae and not autoencoder.encodes_alike(digests, autoencoder.read_digests(data.vae)):
        raise UserError(f"data.vae must be the one that encoded {data.path}, got {data.vae}")
    decoder = _load_vae(config, mesh) if data.vae else None

    @jax.jit
    def prepare(batch):
        return batch | {"moments": vae.moments_to_model_units(batch["moments"], units)}

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


def _load_vae(config, mesh):
    data, model = config.data, config.model
    if not data.vae:
        raise UserError("data.vae must be given: what `dit-convert vae` wrote")
    if data.vae_dtype not in layers.DTYPES:
        names = ", ".join(layers.DTYPES)
        raise UserError(f"data.vae_dtype must be one of {names}, got {data.vae_dtype!r}")
    loaded = autoencoder.load(data.vae, dtype=data.vae_dtype, mesh=mesh)
    channels = loaded.config.latent_channels
    if channels != model.in_channels:
        raise UserError(f"data.vae must have {model.in_channels} latent channels, got {channels}")
    return loaded


def _check(config, *, input_size_and_channels, num_classes, space=None):
    """UserError where the model is not one of these data."""
    model, kind = config.model, config.data.source
    shape = (*model.input_size, model.in_channels)
    for name, value, rule in (
        ("model.input_size and in_channels", shape, tuple(input_size_and_channels)),
        ("model.num_classes", model.num_classes, num_classes),
        ("data.space", config.data.space, space or config.data.space),
    ):
        if value != rule:
            raise UserError(f"{name} must be {rule} for {kind}, got {value}")
