"""Builds what feeds the training step from the settings' topic `data`.

To add a data set, write its source (`__len__`, `__getitem__` -> {"image" or "x0", "label"}) and a
function here that returns a Feed, and list it in `FEEDS` and `fields.SOURCES`. A value that does
not fit is a UserError that names its field.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax

from dit_jax.data import digits, fashion, fields, latents, mirror, prepared, synthetic
from dit_jax.errors import UserError
from dit_jax.machine import cluster, disk
from dit_jax.models import vae
from dit_jax.sampling import autoencoder


class Feed(NamedTuple):
    """The source of examples, the per-example augmentation and the preprocessing of a batch."""

    source: Sequence  # of dicts of NumPy arrays, with random access
    augment: Callable | None  # (example, rng) -> example
    prepare: Callable  # batch on the devices -> {"image", "x0" or "posterior"; "label"}
    decoder: autoencoder.Autoencoder | None = None  # makes images of latents
    vae_digests: dict | None = None  # of the autoencoder that encoded the latents
    sha256: str | None = None  # of what data.path holds, None if it has no digests
    class_names: Sequence[str] = ()  # the name of label i; () if there are no names


def make(settings, mesh=None):
    """The Feed of Settings; mesh: the devices on which an autoencoder runs."""
    data = settings.data
    fields.check(data)
    fed = FEEDS[data.source](settings, mesh)
    if data.source in fields.STORED and not disk.is_on_disk(disk.path(data.path)):
        return fed._replace(source=mirror.Watched(fed.source, fed.source.path))
    return fed


def _of_digits(settings, mesh):
    classes = settings.data.classes
    if len(set(classes)) < len(classes) or max(classes, default=0) >= digits.NUM_CLASSES:
        last = digits.NUM_CLASSES - 1
        raise UserError(f"data.classes must be different digits in 0 .. {last}, got {classes}")
    train, _ = digits.load(classes)
    return _of_arrays(settings, train)


def _of_fashion(settings, mesh):
    return _of_arrays(settings, fashion.load(settings.data.path, settings.data.split))


def _of_arrays(settings, source):
    """The Feed of Arrays."""
    _check(
        settings,
        input_size_and_channels=source.image.shape[1:],
        num_classes=len(source.class_names),
        space="pixels",
    )
    augment = prepared.flip_at_random if settings.data.flip else None
    names = source.class_names
    return Feed(source, augment, _same, sha256=source.sha256, class_names=names)


def _of_synthetic(settings, mesh):
    model = settings.model
    shape = (*model.input_size, model.in_channels)
    return Feed(synthetic.Synthetic(shape, model.num_classes), None, _same)


def _of_images(settings, mesh):
    data, model = settings.data, settings.model
    encoder = load_vae(settings, mesh) if data.space == "latents" else None
    factor = encoder.config.downsampling if encoder else 1
    size = model.input_size[0] * factor
    channels = model.in_channels if encoder else 3

    def check(num_classes):
        shape = (size // factor, size // factor, channels)
        _check(settings, input_size_and_channels=shape, num_classes=num_classes)

    source = _open(
        data,
        lambda path: prepared.open_images(path, data.split, size),
        lambda manifest: check(len(manifest["classes"])),
    )
    check(source.num_classes)
    prepared.warn_of_small(source)
    augment = prepared.flip_at_random if data.flip else None
    names = source.class_names
    if not encoder:
        return Feed(source, augment, _same, sha256=source.sha256, class_names=names)
    digests = autoencoder.read_digests(data.vae)
    return Feed(source, augment, encoder.encode_batch, encoder, digests, source.sha256, names)


def _of_latents(settings, mesh):
    data = settings.data

    def check(manifest):
        height, width, channels = manifest["shape"][1:]
        _check(
            settings,
            input_size_and_channels=(height, width, channels // 2),
            num_classes=manifest["num_classes"],
            space="latents",
        )
        split, digests = manifest["split"], manifest["vae_digests"]
        if data.split != split:
            raise UserError(f"data.split must be {split}, as in {data.path}, got {data.split}")
        if data.vae and not autoencoder.encodes_alike(digests, autoencoder.read_digests(data.vae)):
            raise UserError(f"data.vae must be the one that encoded {data.path}, got {data.vae}")

    source = _open(data, latents.open_latents, check)
    manifest = latents.read_manifest(source.path)
    check(manifest)
    config, digests = vae.VAEConfig.from_json(source.vae), manifest["vae_digests"]
    decoder = load_vae(settings, mesh) if data.vae else None

    @jax.jit
    def prepare(batch):
        posterior = vae.moments_to_model_units(batch["moments"], config)
        return {"posterior": posterior, "label": batch["label"]}

    augment = latents.pick_at_random if data.flip else latents.pick_first
    names = source.class_names
    return Feed(source, augment, prepare, decoder, digests, source.sha256, names)


FEEDS = {
    "digits": _of_digits,
    "fashion": _of_fashion,
    "images": _of_images,
    "latents": _of_latents,
    "synthetic": _of_synthetic,
}


def _open(data, open_folder, check):
    """open_folder(path) of a data set; if it fails on one process, all raise.

    If data.path is in a bucket, check(manifest) comes first, and the path is of this host's copy.
    """
    with cluster.together():
        return open_folder(mirror.local(data.path, data.split, data.cache, check))


def _same(batch):
    return batch


def load_vae(settings, mesh=None):
    """The Autoencoder at data.vae; UserError if its latents do not fit the model."""
    data, model = settings.data, settings.model
    loaded = autoencoder.load(data.vae, dtype=data.vae_dtype, mesh=mesh)
    channels = loaded.config.latent_channels
    if channels != model.in_channels:
        raise UserError(f"data.vae must have {model.in_channels} latent channels, got {channels}")
    return loaded


def _check(settings, *, input_size_and_channels, num_classes, space=None):
    """UserError if the model does not fit the data set."""
    model, data = settings.model, settings.data
    *size, channels = input_size_and_channels
    for name, value, rule in (
        ("model.input_size", model.input_size, tuple(size)),
        ("model.in_channels", model.in_channels, channels),
        ("model.num_classes", model.num_classes, num_classes),
        ("data.space", data.space, space or data.space),
    ):
        if value != rule:
            own = data.source in ("images", "latents")
            hint = f"; --config=configs/folder.py:{data.path} takes it from the data" if own else ""
            raise UserError(f"{name} must be {rule} for {data.source}, got {value}{hint}")
