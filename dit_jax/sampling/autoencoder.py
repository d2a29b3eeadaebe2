"""An autoencoder, opened from its checkpoint: images to latents and back.

Shapes: N batch, H W grid, C channels. Images are uint8 (N, H, W, 3); latents are (N, H/8, W/8, C).
"""

import jax
import numpy as np
from tqdm import tqdm

from dit_jax.checkpoint import steps, store
from dit_jax.errors import UserError
from dit_jax.machine import prng, sharding
from dit_jax.models import pixels, vae

PIXELS = 2**21  # decoded at once on a device: 8 images of 512x512, about 8 GB in float32


def describe(path):
    """The VAEConfig of a checkpoint; reads no array."""
    return vae.VAEConfig.from_json(_read_meta(path)["vae"])


def read_digests(path):
    """{leaf: digest} of the parameters of a checkpoint."""
    return _read_meta(path)["digests"]["params"]


def encodes_alike(digests, others):
    """True if the encoders match; the decoders may differ (ft-EMA and ft-MSE)."""

    def of_encoder(digests):
        return {k: x for k, x in digests.items() if "decoder" not in k and "post_" not in k}

    return of_encoder(digests) == of_encoder(others)


def _read_meta(path):
    return store.read_meta(*_locate(path), of="vae")


def _locate(path):
    directory, step = steps.locate(path, name="vae")
    try:
        store.read_meta(directory, step, of="vae")
        return directory, step
    except store.Damaged:
        raise
    except UserError as error:
        raise UserError(f"vae must be {steps.KINDS['vae']}, got {path}") from error


def load(path, *, dtype="float32", mesh=None):
    """The Autoencoder of a checkpoint of `dit-convert vae`; dtype: of its arithmetic.

    mesh: its devices share the work; None: all devices. UserError if path is no such checkpoint.
    """
    config, mesh = describe(path), mesh or sharding.make_mesh()
    params = store.restore_params(
        *_locate(path), lambda: vae.init(config, prng.key(0)), weights="params", mesh=mesh
    )
    return Autoencoder(config, params, mesh, dtype=dtype)


def save(path, config, params):
    """Writes the checkpoint that `load` opens."""
    with store.open_writer(background=False) as writer:
        store.save(writer, path, 0, {"params": params}, {"vae": config._asdict()})


class Autoencoder:
    """Encodes images to moments, and decodes latents in model units to images.

    jit_encode(params, images) -> posterior, as `encode_batch`, and jit_decode(params, latents) ->
    uint8 images are jitted functions of a batch on the devices.
    """

    def __init__(self, config, params, mesh, *, dtype="float32"):
        self.config, self.params, self._shards = config, params, sharding.batch_shards(mesh)
        encode, decode = vae.make_apply(config, dtype=dtype)
        batch = self._batch = sharding.of_batch(mesh)
        options = {"in_shardings": (None, batch), "out_shardings": batch}
        self._encode = jax.jit(lambda params, x: encode(params, pixels.to_unit(x)), **options)
        self.jit_encode = jax.jit(
            lambda params, x: vae.moments_to_model_units(encode(params, pixels.to_unit(x)), config),
            **options,
        )
        self.jit_decode = jax.jit(
            lambda params, x: pixels.to_uint8(decode(params, vae.from_model_units(x, config))),
            **options,
        )

    def encode(self, images):
        """uint8 images (N, H, W, 3) -> moments (N, H/8, W/8, 2C) float32, in VAE units."""
        height, width = images.shape[1:3]
        if height % self.config.downsampling or width % self.config.downsampling:
            raise UserError(
                f"images must be divisible by {self.config.downsampling}, got {height} x {width}"
            )
        return self._in_chunks(self._encode, images, area=height * width, progress=False)

    def encode_batch(self, batch):
        """A batch {"image" (N, H, W, 3), "label"} on the devices -> {"posterior", "label"}.

        posterior (N, H/8, W/8, 2C): mean and log variance of the latents, in model units.
        """
        posterior = self.jit_encode(self.params, batch["image"])
        return {"posterior": posterior, "label": batch["label"]}

    def decode(self, latents, *, progress=False):
        """uint8 images of latents in model units, a chunk at a time; progress: shows a bar."""
        channels, factor = latents.shape[-1], self.config.downsampling
        if channels != self.config.latent_channels:
            raise UserError(
                f"vae must have {channels} latent channels, got {self.config.latent_channels}"
            )
        area = latents.shape[1] * latents.shape[2] * factor**2
        return self._in_chunks(self.jit_decode, latents, area=area, progress=progress)

    def _in_chunks(self, run, x, *, area, progress):
        """run over x (N, ...), a chunk at a time, the last one padded: NumPy (N, ...)."""
        size = min(max(1, PIXELS // area), -(-len(x) // self._shards)) * self._shards
        padded = np.resize(np.asarray(x), (-(-len(x) // size) * size, *x.shape[1:]))
        out = []
        with tqdm(total=len(x), unit="image", disable=None if progress else True) as bar:
            for start in range(0, len(padded), size):
                chunk = sharding.to_global(padded[start : start + size], self._batch)
                out.append(sharding.to_host(run(self.params, chunk)))
                bar.update(min(size, len(x) - start))
        return np.concatenate(out)[: len(x)]

    def __repr__(self):
        config = self.config
        return (
            f"Autoencoder({config.downsampling}x smaller, {config.latent_channels} channels, "
            f"scale {config.scale}, shift {config.shift})"
        )
