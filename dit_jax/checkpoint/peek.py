"""A quick look at the `meta` of a step, without jax and Orbax: commands check their flags with it.

`store.read_meta` is the full reading, which says what is damaged.
"""

import hashlib
import json

from dit_jax.checkpoint import steps
from dit_jax.errors import UserError
from dit_jax.machine import disk

KINDS = {
    "model": "a DiT",
    "vae": "an autoencoder",
    "inception": "an Inception",
    "classifier": "a classifier",
}  # what meta can describe
FILE = "meta/metadata"  # where Orbax's JSON handler writes it, 0.12.4 to 0.12.8


def meta_of(path, *, of, name="checkpoint"):
    """The meta of the step that `steps.locate` finds, {} if it is in a bucket or cannot be read.

    of: a name in KINDS; UserError if meta does not describe that. name: as of `steps.locate`.
    """
    directory, step = steps.locate(path, name=name)
    meta = read(directory / str(step))
    if meta:
        check_kind(meta, directory / str(step), of, name, path)
    return meta


def read(step):
    """The meta in the folder of a step, {} if it is in a bucket or differs from what was saved."""
    if not disk.is_on_disk(step):
        return {}
    try:
        meta = disk.read_json(step / FILE)
    except (UserError, OSError):
        return {}
    return meta if meta.pop("sha256", None) in (None, sha256(meta)) else {}


def sha256(meta):
    """The digest of a meta, which is saved in it."""
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def check_kind(meta, step, of, name="checkpoint", given=None):
    """UserError if a step's meta does not describe `of`, a name in KINDS."""
    if of in meta:
        return
    if name != "checkpoint":
        raise UserError(f"{name} must be {steps.KINDS[name]}, got {given}")
    raise UserError(f"{name} must be one of {KINDS[of]}, got {step}")
