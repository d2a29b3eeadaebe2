"""Inception, opened from its checkpoint: images to the features that scores compare.

Shapes: N batch, H W grid. Images are uint8 (N, H, W, 3).
"""

from dit_jax.checkpoint import steps, store
from dit_jax.errors import UserError
from dit_jax.machine import sharding
from dit_jax.models import inception
from dit_jax.sampling import chunks

PER_DEVICE = 8  # images at once
NAME = "inception-2015-12-05"


def describe(path):
    """{"sha256": of the converted file, "published": whether it is the one FID is defined by}."""
    return store.read_meta(*_locate(path), of="inception")["inception"]


def read_digests(path):
    """{leaf: digest} of the parameters of a checkpoint."""
    return store.read_meta(*_locate(path), of="inception")["digests"]["params"]


def _locate(path):
    try:
        directory, step = steps.locate(path)
        store.read_meta(directory, step, of="inception")
        return directory, step
    except store.Damaged:
        raise
    except UserError as error:
        raise UserError(f"inception must be {steps.KINDS['inception']}, got {path}") from error


def load(path, *, mesh=None, per_device=None):
    """The Extractor of a checkpoint of `dit-convert inception`.

    mesh: its devices share the work; None: all devices. per_device: images at once on each; None:
    PER_DEVICE. UserError if path is no such checkpoint.
    """
    mesh = mesh or sharding.make_mesh()
    params = store.restore_params(*_locate(path), inception.init, weights="params", mesh=mesh)
    return Extractor(params, mesh, describe(path), per_device=per_device or PER_DEVICE)


def save(path, params, *, sha256, published):
    """Writes the checkpoint that `load` opens; the keywords are those of `describe`."""
    meta = {"inception": {"sha256": sha256, "published": published}}
    with store.open_writer(background=False) as writer:
        store.save(writer, path, 0, {"params": params}, meta)


class Extractor:
    """Computes the features of images, by `chunks.InChunks`.

    identity: JSON that names the network. published: whether its weights are those that FID is
    defined by.
    """

    is_inception = True
    num_features, num_spatial = 2048, 2023  # of `pool` and `spatial`

    def __init__(self, params, mesh, description, *, per_device):
        self.identity = {"network": NAME, **description}
        self.published = description["published"]
        self.params = params
        self._run = chunks.InChunks(inception.apply, mesh, per_device=per_device)

    def __call__(self, images, *, progress=False):
        """{"pool", "spatial", "logits"}, of `inception.Features`, of uint8 images (N, H, W, 3).

        NumPy. progress: shows a bar on a terminal.
        """
        images = chunks.check(images, ("H", "W", 3))
        return self._run(self.params, images, progress=progress)._asdict()
