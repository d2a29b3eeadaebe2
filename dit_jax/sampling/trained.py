"""A trained DiT, opened from its checkpoint: what `dit_jax.load` returns.

Shapes: N batch, S steps, H W grid, C channels.
"""

import dataclasses
import functools

import jax
import numpy as np
from absl import logging

from dit_jax import settings as settings_lib
from dit_jax.checkpoint import steps, store
from dit_jax.diffusion import processes
from dit_jax.diffusion.process import timed
from dit_jax.errors import UserError
from dit_jax.machine import devices, prng, sharding
from dit_jax.models import dit, pixels
from dit_jax.models import vae as vae_lib
from dit_jax.sampling import arguments, autoencoder, calibrate, fields, generate


def load(path, *, step=None, weights="ema", attention="auto", vae=None, vae_dtype="float32"):
    """The LoadedDiT of a training run, of its directory of steps, or of one step.

    step: which saved step of a run; None: the newest. weights: "ema" or "params". attention: a name
    in `models.attention.ATTENTIONS`, or "auto". vae: the checkpoint of an autoencoder that decodes
    the samples, with arithmetic in vae_dtype, "float32" or "bfloat16". UserError if there is no
    such checkpoint.
    """
    if weights not in ("ema", "params"):
        raise UserError(f"weights must be ema or params, got {weights!r}")
    directory, step = steps.locate(path, step)
    meta = store.read_meta(directory, step, of="model")
    settings = settings_lib.read(meta["config"])
    config = dit.DiTConfig.from_json(meta["model"])
    decoder = None
    if vae is not None:
        decoder = _load_decoder(vae, vae_dtype, config, settings.data.space)
    digests = meta.get("vae_digests")  # of the autoencoder that the run was trained with
    if vae and digests and not autoencoder.encodes_alike(digests, autoencoder.read_digests(vae)):
        logging.warning("vae %s is not the one whose latents %s was trained on", vae, path)
    mesh = sharding.make_mesh()
    params = store.restore_params(
        directory, step, lambda: dit.init(config, prng.key(0)), weights=weights, mesh=mesh
    )
    compute = dataclasses.asdict(settings.compute)
    compute["attention"] = devices.resolve_attention(attention, settings.compute.dtype)
    compute["product"] = devices.resolve_product()
    apply = dit.make_apply(config, **compute)
    return LoadedDiT(
        *(config, params, apply, settings, mesh),
        step=step,
        weights=weights,
        decoder=decoder,
        class_names=fields.class_names(meta),
        digest=store.digest(meta, weights),
    )


def _load_decoder(path, dtype, config, space):
    decoder = autoencoder.load(path, dtype=dtype)
    fields.check_decoder(path, decoder.config.latent_channels, config.in_channels, space)
    return decoder


class LoadedDiT:
    """A trained DiT: its config, its parameters, its forward pass and its samples.

    class_names: the name of label 0, 1, ...; () if the checkpoint has none.
    digest: a sha256 of the parameters. seconds_per_image: of the last `sample`, without compilation
    and decoding; None before.
    """

    seconds_per_image = None

    def __init__(
        self,
        config,
        params,
        apply,
        settings,
        mesh,
        *,
        step,
        weights,
        decoder=None,
        class_names=(),
        digest=None,
    ):
        self.config, self.params, self.settings = config, params, settings
        self.step, self.weights, self.decoder = step, weights, decoder
        self.class_names, self.digest = class_names, digest
        self.process = process = processes.make(settings.diffusion)
        apply = timed(apply, process)
        self._apply = jax.jit(apply)
        self._make = functools.cache(
            lambda sampling, trajectory, space=settings.data.space: generate.make(
                *(apply, config, process, mesh),
                space=space,
                sampling=sampling,
                trajectory=trajectory,
            )
        )
        self._make_inversion = functools.cache(
            lambda sampling, iterations: generate.make_inversion(
                *(apply, config, process, mesh), sampling=sampling, iterations=iterations
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

    @property
    def schedule(self):
        """The `process.Levels` that samples pass with the run's own options: S steps, (S+1,) each.

        Its alpha, sigma and time go from noise to data. `levels` gives those of other options.
        """
        return self.levels()

    def levels(self, **sampling):
        """The `process.Levels` of samples with these options of `self.sampling`."""
        return generate.make_levels(self.process, self._read_sampling(sampling))

    def cost(self, **sampling):
        """(network calls, forward passes) that an image takes; a guided call is two passes."""
        options = self._read_sampling(sampling)
        counts = generate.count_calls, generate.count_passes
        return tuple(count(self.process, options) for count in counts)

    def flops(self, **sampling):
        """FLOPs that an image takes, with those of passes whose blocks a cache forecasts."""
        return generate.count_flops(self.config, self.process, self._read_sampling(sampling))

    def cache_bytes(self, **sampling):
        """Bytes that the cache of an image takes; 0 without a cache."""
        options, dtype = self._read_sampling(sampling), self.settings.compute.dtype
        return generate.cache_bytes(self.config, self.process, options, dtype)

    @property
    def num_params(self):
        """How many numbers the parameters are."""
        return sum(x.size for x in jax.tree.leaves(self.params))

    def __call__(self, x, t, y):
        """x (N, H, W, C) in model units, t times, y labels -> (N, H, W, out) float32.

        t, () or (N,), is the process's time, 0 the cleanest: a step of DDPM or a real number
        between steps, or the time of a path in 0 .. 1. y (N,) are labels, the null label included;
        y (N, num_classes) are weights that mix the vectors of the labels, each row with the sum 1.
        The first C channels of the result are `settings.diffusion.prediction`, which
        `process.read(out, x, t)` turns into x_0 and noise; the others are the variance code, which
        a path has not. UserError if shapes or values do not fit.
        """
        x, t, y = arguments.of_call(x, t, y, config=self.config, last_time=self.process.last_time)
        return self._apply(self.params, x, t=t, y=y)

    def watch(self, x, t, y):
        """(what a call returns, its `models.watched.Watched`): tokens and attention by block."""
        x, t, y = arguments.of_call(x, t, y, config=self.config, last_time=self.process.last_time)
        return self._watch(self.params, x, t=t, y=y)

    @functools.cached_property
    def _watch(self):
        apply = dit.make_apply(self.config, dtype=self.settings.compute.dtype, watch=True)
        return jax.jit(timed(apply, self.process))

    def sample(
        self,
        labels,
        *,
        seed=0,
        noise=None,
        same_noise=False,
        trajectory=False,
        levels=None,
        first=0,
        batch_size=256,
        progress=False,
        **sampling,
    ):
        """One image for each label: uint8 (N, H, W, C), or latents if there is no decoder.

        labels: N whole numbers, or weights (N, num_classes) that mix the vectors of the labels,
        each row with the sum 1. noise: where to start, (N, H, W, C) standard normal numbers times
        `process.noise_scale`; None: drawn from the seed, as is that of later steps. first: these
        are the images first, first + 1, ... of the seed, each with its own noise; same_noise: all
        with that of the first. trajectory True: returns what the sampler has at every level of
        noise, (S+1, N, ...) for S steps, from the noise to the samples; "x0": returns that and the
        x0 that is predicted at each level, (2, S+1, N, ...). levels: which of the 0 .. S a
        trajectory has; None: all.

        Latents are float32, in model units. `sampling` overrides options of `self.sampling`. The
        same seed gives the same images with any batch_size. progress: shows a bar on a terminal.
        UserError for an argument that does not fit, or if a sample is not finite.
        """
        options, config = self._read_sampling(sampling), self.config
        arguments.check_whole("batch_size", batch_size, 1)
        arguments.check_whole("seed", seed, 0, settings_lib.MAX_SEED)
        arguments.check_whole("first", first, 0, 2**32 - 2)
        if not isinstance(progress, (bool, np.bool_)):
            raise UserError(f"progress must be true or false, got {progress!r}")
        trajectory, levels = arguments.read_trajectory(
            trajectory, levels, generate.make_levels(self.process, options).num_steps
        )
        labels = arguments.read_labels("labels", labels, config.num_classes, config)
        if noise is not None:
            shape = (len(labels), *config.input_size, config.in_channels)
            noise = arguments.read_grid("noise", noise, shape)
        seconds = []
        images = generate.run(
            self._make(options, trajectory),
            self.params,
            labels,
            seed=seed,
            batch_size=batch_size,
            first=first,
            noise=noise,
            same_noise=same_noise,
            progress=progress,
            seconds=seconds,
        )
        self.seconds_per_image = sum(seconds) / len(labels)
        if trajectory:
            rank = len(config.input_size) + 1  # of H, W, C
            images = np.moveaxis(images, 0, -1 - rank).take(levels, axis=-2 - rank)
        return self._decode(images, progress) if self.decoder else images

    def calibrate(self, labels, wanted, *, seed=0, batch_size=256, **sampling):
        """The `calibrate.Calibration` of samples of these labels: a schedule for the option cache.

        wanted: how many steps to compute, or, below 1, the change of the first block after which a
        step is computed. The samples are drawn without a cache. UserError as `sample`.
        """
        options = self._read_sampling(sampling | {"cache": "none", "cache_guidance": "none"})
        fields.check_calibration(wanted, options.num_steps, self.settings.diffusion)
        levels = generate.make_levels(self.process, options)
        labels = arguments.read_labels("labels", labels, self.config.num_classes, self.config)
        draw = self._make(options, True, "latents")  # in model units
        x = generate.run(draw, self.params, labels, seed=seed, batch_size=batch_size)
        first = dit.make_apply(self.config._replace(depth=1), dtype=self.settings.compute.dtype)
        apply = timed(first, self.process)
        changes = calibrate.measure(apply, self.params, x, levels.time[:-1], labels)
        return calibrate.calibrate(changes, wanted)

    def invert(self, images, labels, *, iterations=3, batch_size=256, progress=False, **sampling):
        """The noise from which DDIM makes the images again: (N, H, W, C) float32, in model units.

        images: uint8 as of `sample`, or data in model units, (N, H, W, C). labels: as of `sample`.
        `sample(others, noise=..., sampler="ddim", cfg_scale=1)` with the same steps shows the
        images with other labels. `sampling`: num_steps, spacing or shift; spacing="log_snr" has
        small steps at both ends, which are easier to invert. Each step takes so many iterations,
        each a network call. UserError as `sample`.
        """
        if unknown := sampling.keys() - {"num_steps", "spacing", "shift"}:
            rule = "an option of an inversion must be num_steps, spacing or shift"
            raise UserError(f"{rule}, got {min(unknown)}")
        others = {"sampler": "ddim", "eta": 0.0, "sde_noise": "sigma", "sde_last": 0.04}
        others |= {"cache": "none", "cache_guidance": "none"}
        options = self._read_sampling(sampling | others)
        arguments.check_whole("batch_size", batch_size, 1)
        arguments.check_whole("iterations", iterations, 1)
        labels = arguments.read_labels("labels", labels, self.config.num_classes, self.config)
        return generate.run(
            self._make_inversion(options, int(iterations)),
            self.params,
            labels,
            seed=0,
            batch_size=batch_size,
            noise=self._read_images(images, len(labels)),
            progress=progress,
        )

    def _read_images(self, images, count):
        """uint8 images, or data in model units, as data in model units: NumPy float32."""
        shape = (count, *self.config.input_size, self.config.in_channels)
        if getattr(images, "dtype", None) != np.uint8:
            return arguments.read_grid("images", images, shape)
        if self.space == "latents" and self.decoder is None:
            raise UserError("images must be latents for a model without a vae, got pixels in uint8")
        if self.decoder:
            factor = self.decoder.config.downsampling
            shape = (count, *(factor * side for side in self.config.input_size), 3)
        if images.shape != shape:
            raise UserError(f"images must have shape {shape}, got {images.shape}")
        if self.decoder is None:
            return np.asarray(pixels.to_unit(images))
        moments = self.decoder.encode(np.asarray(images))
        return np.asarray(vae_lib.to_model_units(vae_lib.mode(moments), self.decoder.config))

    def _read_sampling(self, given):
        """The Sampling of the run's config and the options that are given, checked."""
        if unknown := given.keys() - self.sampling.keys():
            raise UserError(
                f"a sampling option must be one of {', '.join(self.sampling)}, got {min(unknown)}"
            )
        options = self.sampling | arguments.plain(given)
        options = settings_lib.read_topic(settings_lib.Sampling, options)
        fields.check_process(options, self.config, self.settings.diffusion)
        generate.check(self.config, self.process, options)
        return options

    def _decode(self, latents, progress):
        """latents (..., H, W, C) -> uint8 (..., H, W, 3)."""
        images = self.decoder.decode(latents.reshape(-1, *latents.shape[-3:]), progress=progress)
        return images.reshape(*latents.shape[:-3], *images.shape[1:])

    @property
    def name(self):
        """Size and patch, such as "XL/2"."""
        return self.config.name

    def __repr__(self):
        design = self.config.conditioning
        return f"LoadedDiT({self.name} {design}, step {self.step}, {self.weights})"
