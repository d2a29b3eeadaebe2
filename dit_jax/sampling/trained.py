"""A trained DiT, opened from its checkpoint: what `dit_jax.load` returns.

Shapes: N batch, H W grid, C channels.
"""

import dataclasses
import functools
import numbers

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from dit_jax import settings as settings_lib
from dit_jax.checkpoint import steps, store
from dit_jax.diffusion import processes
from dit_jax.errors import UserError
from dit_jax.machine import devices, sharding
from dit_jax.models import dit
from dit_jax.sampling import autoencoder, generate


def load(path, *, weights="ema", attention="auto", vae=None, vae_dtype="float32"):
    """The LoadedDiT of a training run, of its directory of steps, or of one step.

    weights: "ema" or "params". attention: a name in `models.attention.ATTENTIONS`, or "auto". vae:
    the checkpoint of an autoencoder that decodes the samples, with arithmetic in vae_dtype,
    "float32" or "bfloat16". UserError if there is no such checkpoint.
    """
    if weights not in ("ema", "params"):
        raise UserError(f"weights must be ema or params, got {weights!r}")
    directory, step = steps.locate(path)
    meta = store.read_meta(directory, step, of="model")
    settings = settings_lib.read(meta["config"])
    config = dit.DiTConfig.from_json(meta["model"])
    decoder = vae and _load_decoder(vae, vae_dtype, config, settings.data.space)
    digests = meta.get("vae_digests")  # of the autoencoder that the run was trained with
    if vae and digests and not autoencoder.encodes_alike(digests, autoencoder.read_digests(vae)):
        logging.warning("vae %s is not the one whose latents %s was trained on", vae, path)
    mesh = sharding.make_mesh()
    params = store.restore_params(
        directory, step, lambda: dit.init(config, jax.random.key(0)), weights=weights, mesh=mesh
    )
    compute = dataclasses.asdict(settings.compute)
    compute["attention"] = devices.resolve_attention(attention, settings.compute.dtype)
    apply = dit.make_apply(config, **compute)
    return LoadedDiT(
        config, params, apply, settings, mesh, step=step, weights=weights, decoder=decoder
    )


def _load_decoder(path, dtype, config, space):
    decoder = autoencoder.load(path, dtype=dtype)
    channels = decoder.config.latent_channels
    if space != "latents":
        raise UserError(f"vae must be none for a model of {space}, got {path}")
    if channels != config.in_channels:
        raise UserError(f"vae must have {config.in_channels} latent channels, got {channels}")
    return decoder


class LoadedDiT:
    """A trained DiT: its config, its parameters, its forward pass and its samples."""

    def __init__(self, config, params, apply, settings, mesh, *, step, weights, decoder=None):
        self.config, self.params, self.settings = config, params, settings
        self.step, self.weights, self.decoder = step, weights, decoder
        self._process = process = processes.make(settings.diffusion)
        self._apply = jax.jit(apply)
        self._make = functools.cache(
            lambda sampling: generate.make(
                apply, config, process, mesh, space=settings.data.space, sampling=sampling
            )
        )

    @property
    def space(self):
        """What the model generates: "pixels" or "latents"."""
        return self.settings.data.space

    @property
    def sampling(self):
        """{option: value}: how the run's config wants to be sampled."""
        return dataclasses.asdict(self.settings.sampling)

    def __call__(self, x, t, y):
        """x (N, H, W, C) in model units, t (N,) times, y (N,) labels -> (N, H, W, out) float32.

        t is a step of the training, 0 the cleanest, or a real number between steps. The first C
        channels of the result are what the process predicts, for DDPM the noise; the others are
        the variance code. UserError if shapes or values do not fit.
        """
        x, t, y = _to_array("x", x), _to_array("t", t), _to_array("y", y)
        image = (*self.config.input_size, self.config.in_channels)
        count = y.size
        if not count or (x.shape, t.shape, y.shape) != ((count, *image), (count,), (count,)):
            shape = ", ".join(map(str, image))
            raise UserError(
                f"x, t and y must have shapes (N, {shape}), (N,) and (N,), N at least 1, "
                f"got {x.shape}, {t.shape} and {y.shape}"
            )
        t = _check_time(t, self._process.last_time)
        y = _check_whole("y", y, self.config.num_classes + self.config.null_label)
        return self._apply(self.params, x, t=t, y=y)

    def sample(self, labels, *, seed=0, batch_size=256, progress=False, **sampling):
        """One image for each label: uint8 (N, H, W, C), or latents if there is no decoder.

        Latents are float32, in model units. `sampling` overrides options of `self.sampling`. The
        same seed gives the same images with any batch_size. progress: shows a bar on a terminal.
        UserError for a label, a seed or an option that does not fit.
        """
        unknown = sampling.keys() - self.sampling.keys()
        if unknown:
            raise UserError(
                f"a sampling option must be one of {', '.join(self.sampling)}, got {min(unknown)}"
            )
        if not isinstance(batch_size, numbers.Integral) or batch_size < 1:
            raise UserError(f"batch_size must be a whole number of at least 1, got {batch_size!r}")
        if not isinstance(seed, numbers.Integral) or not 0 <= seed < 2**32:
            raise UserError(f"seed must be a whole number in 0 .. {2**32 - 1}, got {seed!r}")
        labels = _check_whole("labels", labels, self.config.num_classes)
        options = settings_lib.read_topic(settings_lib.Sampling, self.sampling | _plain(sampling))
        generate.check(self.config, self._process, options)
        images = generate.run(
            self._make(options),
            self.params,
            labels,
            seed=seed,
            batch_size=batch_size,
            progress=progress,
        )
        return self.decoder.decode(images, progress=progress) if self.decoder else images

    def __repr__(self):
        config = self.config
        shape = (config.depth, config.hidden_size, config.num_heads)
        names = {size: name for name, size in dit.SIZES.items()}
        size = f"{names.get(shape, 'of its own size')}/{config.patch_size}"
        return f"LoadedDiT({size} {config.conditioning}, step {self.step}, {self.weights})"


def _plain(options):
    """Options as plain Python values: arrays as numbers or lists."""
    return {k: v.tolist() if hasattr(v, "tolist") else v for k, v in options.items()}


def _to_array(name, values):
    try:
        return jnp.asarray(values)
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"{name} must be an array of numbers, got {values!r}") from None


def _check_time(t, last):
    """t (N,), each in 0 .. last; values traced by jit are not checked."""
    if not isinstance(t, jax.core.Tracer):
        wrong = np.asarray(t)[~((t >= 0) & (t <= last))]
        if wrong.size:
            raise UserError(f"t must be in 0 .. {last}, got {wrong[0]}")
    return t


def _check_whole(name, values, limit):
    """values (N,), each in 0 .. limit - 1, as int32; values traced by jit are not checked."""
    if isinstance(values, jax.core.Tracer):
        return values
    try:
        array = np.asarray(values)
    except ValueError:  # ragged
        raise UserError(f"{name} must be a list of whole numbers, got {values!r}") from None
    # NumPy keeps integers that are too large for its own types as objects.
    whole = array.dtype.kind in "iu" or all(type(value) is int for value in array.flat)
    if array.ndim != 1 or not array.size or not whole:
        raise UserError(f"{name} must be a list of whole numbers, got {array.tolist()!r}")
    wrong = array[(array < 0) | (array >= limit)]
    if wrong.size:
        raise UserError(f"{name} must be in 0 .. {limit - 1}, got {wrong[0]}")
    return array.astype(np.int32)
