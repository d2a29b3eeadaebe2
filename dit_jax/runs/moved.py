"""Whether a resumed run still has the data that it was trained on, wherever they are now.

A checkpoint records digests of what data.path and data.vae hold. A resumed run may name other paths
if the digests are the same. Older versions recorded no digest of the data: such runs can go on with
the same path only.
"""

from absl import logging

from dit_jax.checkpoint import steps, store
from dit_jax.errors import UserError
from dit_jax.machine import disk
from dit_jax.runs import own_config
from dit_jax.runs import workdir as workdirs
from dit_jax.sampling import autoencoder


def check(workdir, settings, fed):
    """UserError unless a Feed of the Settings holds what the run in workdir, if any, was fed with.

    Logs which paths have changed. Writes nothing.
    """
    if not disk.exists(workdir / "config.json") or not workdirs.has_saved(workdir):
        return
    old, new = own_config.read_settings(workdir).data, settings.data
    meta = _newest_meta(workdir / "checkpoints")
    data, vae = meta.get("data_sha256"), meta.get("vae_digests")
    alike = vae and fed.vae_digests and autoencoder.encodes_alike(vae, fed.vae_digests)
    for name, before, after, known, same in (
        ("path", old.path, new.path, data and fed.sha256, data == fed.sha256),
        ("vae", old.vae, new.vae, vae and fed.vae_digests, alike),
    ):
        if known and not same:
            raise UserError(
                f"data.{name} must hold what the run in {workdir} was trained on, got {after}, "
                "whose digests differ: use another --workdir, and to start from what this run has "
                f"learned, --init_from={workdir}"
            )
        if before != after and not known:
            raise UserError(
                f"data.{name} must be {before!r}, as in {workdir}, got {after!r}: there are no "
                "digests that show that both hold the same"
            )
        if before != after:
            logging.info("data.%s was %r and is %r: the same content", name, before, after)


def _newest_meta(directory):
    """The meta of the newest step that can be read, {} if there is none."""
    for step in reversed(steps.saved(directory)):
        try:
            return store.read_meta(directory, step)
        except store.Damaged:  # `run.resume` sets it aside
            continue
    return {}
