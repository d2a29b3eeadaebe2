"""Encodes a dataset into a cache of latents that loses nothing: moments of each image and its flip.

    dit-encode data/imagenet data/latents256 --vae=runs/vae --size=256

DATASET is what dit-prepare wrote, or a directory of tensorflow-datasets. Training from the cache
(--config.data.source=latents --config.data.path=data/latents256) draws flips and posterior noise as
training from the images does. Every process of a pod encodes its share of the shards. Start the
same command again after anything that stopped it: it goes on. --verify=N encodes N examples of a
finished cache again and compares. At size 256 an image takes 32 KB in float16, with Stable
Diffusion's VAE, which keeps every moment to 5e-4 of itself or to 3e-8; float32 takes twice as much.
"""

import contextlib
import sys
import time
from pathlib import Path

import jax
import numpy as np
from absl import flags, logging
from jax.experimental import multihost_utils
from tqdm import tqdm

from dit_jax.cli import command
from dit_jax.data import images, latents, prepared, shards
from dit_jax.errors import UserError
from dit_jax.machine import disk, sharding
from dit_jax.sampling import autoencoder

BATCH = 32  # examples encoded at once, and as many flips


def define(values):
    options = {"flag_values": values}
    flags.DEFINE_string("vae", None, "What dit-convert vae wrote.", **options)
    flags.DEFINE_integer("size", 256, "Of the crop, in pixels.", lower_bound=1, **options)
    flags.DEFINE_string("split", "train", "Of the dataset.", **options)
    flags.DEFINE_enum("dtype", "float16", latents.DTYPES, "Of the numbers at rest.", **options)
    flags.DEFINE_integer(
        "examples_per_shard", 4096, "Of a file: 128 MB at size 256.", lower_bound=1, **options
    )
    flags.DEFINE_integer(
        "verify", 0, "Encode so many examples of a finished OUT again.", lower_bound=0, **options
    )

    command.define_cluster(values)


def main(values, dataset, out):
    out = command.output_folder(out)
    mine = sharding.make_mesh(devices=jax.local_devices())  # each process is at work by itself
    model = autoencoder.load(values.vae, mesh=mine)
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
    """What the numbers in a cache depend on, as JSON."""
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
    """Writes this process's share of the shards that are not there, and then the manifest."""
    if jax.process_index() == 0:
        latents.claim(out, plan)
        for path in [*out.glob(".partial-*"), *out.glob(f"{shards.PROGRESS}/.partial-*")]:
            path.unlink()  # of a run that was killed
    wait("claimed")
    ranges = latents.shard_ranges(len(source), plan["examples_per_shard"])
    written = latents.find_written(out)
    mine = list(ranges)[jax.process_index() :: jax.process_count()]
    todo = [name for name in mine if name not in written]
    wait("counted")
    if todo:
        prepared.warn_of_small(source)
    started = time.perf_counter()
    with tqdm(total=sum(len(ranges[name]) for name in todo), unit="image", disable=None) as bar:
        for name in todo:
            examples = encode(model, source, ranges[name], plan["dtype"], bar.update)
            latents.write_shard(out, name, examples, plan["dtype"])
    if todo:
        count = sum(len(ranges[name]) for name in todo)
        rate = count / (time.perf_counter() - started)
        logging.info("encoded %d images and their flips, %.1f images/s", count, rate)
    wait("encoded")
    if jax.process_index() == 0:
        latents.finish(out, plan, ranges)
        logging.info("%s is finished: %d examples", out, len(source))


def encode(model, source, places, dtype, tell=None):
    """(label, moments (2, H, W, 2C)) of the examples at `places`, a batch at a time."""
    for start in range(0, len(places), BATCH):
        examples = [source[i] for i in places[start : start + BATCH]]
        plain = np.stack([example["image"] for example in examples])
        both = np.stack([plain, images.flip(plain)], axis=1)  # (N, 2, H, W, 3)
        both = np.resize(both, (BATCH, *both.shape[1:]))  # one program, also for the last ones
        moments = model.encode(both.reshape(-1, *both.shape[2:]))
        moments = moments.reshape(BATCH, 2, *moments.shape[1:])
        if dtype == "float16":
            moments = moments.clip(-65504, 65504)
        for example, pair in zip(examples, moments, strict=False):
            yield example["label"], pair
        if tell:
            tell(len(examples))


def verify(model, source, plan, out, count):
    """Encodes random examples of a finished cache again: 0 where they are the same, else 1."""
    manifest = latents.read_manifest(out)
    if manifest is None:
        raise UserError(f"OUT must be a finished directory of dit-encode, got {out}")
    latents.check_plan(out, manifest, plan)
    shards.check_files(out, manifest["shards"])
    for name, known in manifest["shards"].items():
        shards.check_digest(Path(out) / name, known)
    cache = latents.open_latents(out)
    places = np.random.default_rng().choice(len(source), min(count, len(source)), replace=False)
    worst = 0.0
    for place, (label, moments) in zip(
        places, encode(model, source, places.tolist(), plan["dtype"]), strict=True
    ):
        kept = cache[place]
        if kept["label"] != label:
            print(f"not the same: example {place} has label {kept['label']}, not {label}")
            return 1
        scale = np.abs(moments).max()
        worst = max(worst, float(np.abs(kept["moments"] - moments).max() / scale))
    bound = {"float16": 1e-3, "float32": 1e-4}[plan["dtype"]]
    verdict = "the same" if worst <= bound else "not the same"
    print(f"{verdict}: {len(places)} examples within {worst:.1e} of their largest moment")
    return 0 if worst <= bound else 1


def wait(name):
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def entry():
    sys.exit(command.run("dit-encode", define, main, required=["vae"], takes=("DATASET", "OUT")))


if __name__ == "__main__":
    entry()
