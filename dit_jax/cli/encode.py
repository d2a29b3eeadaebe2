"""Encodes a dataset into a cache of latents: the moments of each image and of its mirror image.

    dit-encode data/imagenet data/latents256 --vae=runs/vae --size=256

DATASET is a directory that dit-prepare or tensorflow-datasets wrote. Training from the cache
(--config.data.source=latents --config.data.path=data/latents256) draws the same flips and posterior
noise as training from the images. Each process of a pod encodes its share of the shards. To resume
after any interruption, repeat the command. --verify=N encodes N random examples of a finished cache
again and compares. At size 256, with Stable Diffusion's VAE, an image takes 32 KB in float16, which
keeps every moment to a relative error of 5e-4 or an absolute error of 3e-8; float32 takes twice as
much.
"""

import contextlib
import sys
import time
from pathlib import Path

import jax
import numpy as np
from absl import flags, logging
from tqdm import tqdm

from dit_jax import compat
from dit_jax.cli import command
from dit_jax.data import arrayrecord, images, latents, prepared
from dit_jax.errors import UserError
from dit_jax.machine import disk, sharding
from dit_jax.sampling import autoencoder

BATCH = 32  # images encoded at once, and as many mirror images


def define(values):
    options = {"flag_values": values}
    flags.DEFINE_string("vae", None, "Folder that `dit-convert vae` wrote.", **options)
    flags.DEFINE_integer("size", 256, "Size of the crop in pixels.", lower_bound=1, **options)
    flags.DEFINE_string("split", "train", "Split of the dataset to encode.", **options)
    flags.DEFINE_enum("dtype", "float16", latents.DTYPES, "Dtype of the moments.", **options)
    flags.DEFINE_integer(
        "examples_per_shard", 4096, "4096 are 128 MB at size 256.", lower_bound=1, **options
    )
    flags.DEFINE_integer(
        "verify", 0, "Check this many examples of a finished OUT.", lower_bound=0, **options
    )
    command.define_cluster(values)


def main(values, dataset, out):
    out = command.output_folder(out)
    mesh = sharding.make_mesh(devices=jax.local_devices())  # each process works alone
    model = autoencoder.load(values.vae, mesh=mesh)
    if values.size % model.config.downsampling:
        raise UserError(f"size must be divisible by {model.config.downsampling}, got {values.size}")
    source = prepared.open_images(command.expand(dataset), values.split, values.size)
    plan = make_plan(values, model, source)
    if values.verify:
        return verify(model, source, plan, out, values.verify)
    out.mkdir(parents=True, exist_ok=True)
    with disk.locked(out, "OUT") if jax.process_index() == 0 else contextlib.nullcontext():
        encode_all(model, source, plan, out)
    return 0


def make_plan(values, model, source):
    """The settings on which the content of a cache depends, as JSON values."""
    height, width, channels = model.encode(source[0]["image"][None]).shape[1:]
    config = model.config._asdict()
    return {
        "vae": {k: list(v) if isinstance(v, tuple) else v for k, v in config.items()},
        "vae_digests": autoencoder.read_digests(values.vae),
        "split": values.split,
        "size": values.size,
        "dtype": values.dtype,
        "examples_per_shard": values.examples_per_shard,
        "num_examples": len(source),
        "num_classes": source.num_classes,
        "shape": [2, height, width, channels],
    }


def encode_all(model, source, plan, out):
    """Writes this process's missing shards, then, on process 0, the manifest."""
    if jax.process_index() == 0:
        latents.claim(out, plan)
        arrayrecord.remove_partials(out)
    barrier("claimed")
    ranges = latents.shard_ranges(len(source), plan["examples_per_shard"])
    written = latents.find_written(out)
    names = list(ranges)[jax.process_index() :: jax.process_count()]
    missing = [name for name in names if name not in written]
    barrier("counted")
    if missing:
        prepared.warn_of_small(source)
    count, started = sum(len(ranges[name]) for name in missing), time.perf_counter()
    with tqdm(total=count, unit="image", disable=None) as bar:
        for name in missing:
            examples = encode(model, source, ranges[name], plan["dtype"], bar.update)
            latents.write_shard(out, name, examples, plan["dtype"])
    if missing:
        rate = count / (time.perf_counter() - started)
        logging.info("encoded %d images and their mirror images, %.1f images/s", count, rate)
    barrier("encoded")
    if jax.process_index() == 0:
        latents.finish(out, plan, ranges)
        logging.info("finished %s: %d examples", out, len(source))


def encode(model, source, indices, dtype, on_progress=None):
    """Yields (label, moments (2, H, W, 2C) in VAE units) of the examples at `indices`.

    on_progress(count) is called after each batch.
    """
    for start in range(0, len(indices), BATCH):
        examples = [source[i] for i in indices[start : start + BATCH]]
        plain = np.stack([example["image"] for example in examples])
        both = np.stack([plain, images.flip(plain)], axis=1)  # (N, 2, H, W, 3)
        both = np.resize(both, (BATCH, *both.shape[1:]))  # a constant shape compiles only once
        moments = model.encode(both.reshape(-1, *both.shape[2:]))
        moments = moments.reshape(BATCH, 2, *moments.shape[1:])
        if dtype == "float16":
            moments = moments.clip(-65504, 65504)
        for example, pair in zip(examples, moments, strict=False):
            yield example["label"], pair
        if on_progress:
            on_progress(len(examples))


def verify(model, source, plan, out, count):
    """Encodes random examples of a finished cache again; returns 0 if they match, else 1."""
    manifest = latents.read_manifest(out)
    if manifest is None:
        raise UserError(f"OUT must be a finished directory of dit-encode, got {out}")
    latents.check_plan(out, manifest, plan)
    arrayrecord.check_files(out, manifest["shards"])
    for name, entry in manifest["shards"].items():
        arrayrecord.check_digest(Path(out) / name, entry)
    cache = latents.open_latents(out)
    indices = np.random.default_rng().choice(len(source), min(count, len(source)), replace=False)
    encoded = encode(model, source, indices.tolist(), plan["dtype"])
    worst = 0.0
    for i, (label, moments) in zip(indices, encoded, strict=True):
        cached = cache[i]
        if cached["label"] != label:
            print(f"not the same: example {i} has label {cached['label']}, not {label}")
            return 1
        scale = np.abs(moments).max()
        worst = max(worst, float(np.abs(cached["moments"] - moments).max() / scale))
    bound = {"float16": 1e-3, "float32": 1e-4}[plan["dtype"]]
    verdict = "the same" if worst <= bound else "not the same"
    print(f"{verdict}: {len(indices)} examples differ by at most {worst:.1e} of the largest moment")
    return 0 if worst <= bound else 1


def barrier(name):
    """Waits until every process has reached this point."""
    if jax.process_count() > 1:
        compat.sync_processes(name)


def entry():
    sys.exit(command.run("dit-encode", define, main, required=["vae"], takes=("DATASET", "OUT")))


if __name__ == "__main__":
    entry()
