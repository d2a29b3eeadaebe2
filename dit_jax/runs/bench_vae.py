"""Measures how fast this machine encodes images or decodes latents with the autoencoder.

Shapes: N batch, H W grid, C channels.
"""

import jax
import jax.numpy as jnp

from dit_jax.convert import files
from dit_jax.data import feed
from dit_jax.machine import devices, prng, sharding
from dit_jax.models import vae
from dit_jax.runs import bench, build
from dit_jax.sampling import autoencoder

RANDOM = vae.VAEConfig()  # Stable Diffusion's; with the latent channels of the model


def measure(settings, what, *, repeats, warmup, peer):
    """The figures of "encode" or "decode" of one batch of random images or latents.

    The autoencoder is that at data.vae, or a random one if there is none. peer: also run diffusers'
    autoencoder in PyTorch, in turn with ours.
    """
    if peer:
        for name in ("torch", "diffusers.models"):
            files.require(name)
        bench.leave_memory()
    mesh = build.parts(settings).mesh
    with devices.explained_memory():
        model = open_model(settings, mesh)
        ours = prepare(settings, what, model, mesh)
        runs = {"dit_jax": ours.run} | (make_peers(settings, what, model.config) if peer else {})
        seconds, first = bench.time_in_turn(runs, repeats, warmup)
    config, count = model.config, sum(x.size for x in jax.tree.leaves(model.params))
    figures = {
        "what": what,
        "autoencoder": settings.data.vae or "random",
        "autoencoder_parameters": count,
        "image_size": list(image_size(settings, config)),
        "latent_channels": config.latent_channels,
        "dtype": settings.data.vae_dtype,
        "batch_size": settings.train.batch_size,
        "devices": devices.describe(),
        "jax": jax.__version__,
        **bench.speed(seconds["dit_jax"], settings),
        "compile_seconds": ours.compile_seconds,
        "peak_memory_gb": ours.memory / 1e9,
    }
    for name in runs.keys() - {"dit_jax"}:
        figures |= bench.compare(name, seconds, first[name], settings)
    return figures


def open_model(settings, mesh):
    """The Autoencoder at data.vae, or a random one whose latents fit the model."""
    if settings.data.vae:
        return feed.load_vae(settings, mesh)
    config = RANDOM._replace(latent_channels=settings.model.in_channels)
    init = jax.jit(lambda key: vae.init(config, key), out_shardings=sharding.replicated(mesh))
    params = init(prng.key(0))
    return autoencoder.Autoencoder(config, params, mesh, dtype=settings.data.vae_dtype)


def image_size(settings, config):
    """(H, W) of the images that are encoded or decoded."""
    return tuple(length * config.downsampling for length in settings.model.input_size)


def prepare(settings, what, model, mesh):
    """The `bench.Work` of a batch that stays on the devices; its FLOPs are not counted."""
    size, key = settings.train.batch_size, prng.key(1)

    def images():
        shape = (size, *image_size(settings, model.config), model.config.in_channels)
        return jax.random.bits(key, shape, jnp.uint8)  # (N, H, W, 3)

    def latents():
        shape = (size, *settings.model.input_size, model.config.latent_channels)
        return jax.random.normal(key, shape, jnp.float32)  # (N, H / 8, W / 8, C)

    jitted, draw = {
        "encode": (model.jit_encode, images),
        "decode": (model.jit_decode, latents),
    }[what]
    batch = jax.jit(draw, out_shardings=sharding.of_batch(mesh))()
    compiled, compile_seconds = bench.compile_timed(jitted, model.params, batch)

    def run():
        jax.block_until_ready(compiled(model.params, batch))

    run()
    memory, needed = devices.peak_memory(), bench.needed_bytes(compiled)
    return bench.Work(run, 0.0, compile_seconds, memory, needed)


def make_peers(settings, what, config):
    """{name: run} of the same work in PyTorch."""
    from dit_jax.convert import torch_peer  # which imports torch

    options = {"batch_size": settings.train.batch_size, "dtype": settings.data.vae_dtype}
    options["size"] = image_size(settings, config)
    return {
        name: torch_peer.make_autoencoder(config, what, compiled=compiled, **options)
        for name, compiled in (("torch", False), ("torch_compile", True))
    }
