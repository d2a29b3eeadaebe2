"""Encodes a dataset into a cache of latents, and checks a cache."""

import contextlib
import time
from pathlib import Path

import jax
import numpy as np
from absl import logging
from tqdm import tqdm

from dit_jax import compat
from dit_jax.data import arrayrecord, images, latents, prepared
from dit_jax.data.fields import check_size
from dit_jax.machine import disk, sharding, words
from dit_jax.sampling import autoencoder

BATCH = 32  # images encoded at once, and as many mirror images


def run(options, dataset, out):
    """Encodes the dataset into `out`, or checks options.verify of its examples; the exit code.

    options: the flags of dit-encode.
    """
    mesh = sharding.make_mesh(devices=jax.local_devices())  # each process works alone
    model = autoencoder.load(options.vae, mesh=mesh)
    check_size(options.size, model.config.downsampling)
    source = prepared.open_images(dataset, options.split, options.size)
    plan = make_plan(options, model, source)
    if options.verify:
        return verify(model, source, plan, out, options.verify)
    disk.make_folder(out, "OUT")
    with disk.locked(out, "OUT") if jax.process_index() == 0 else contextlib.nullcontext():
        encode_all(model, source, plan, out)
    return 0


def make_plan(options, model, source):
    """The settings on which the content of a cache depends, as JSON values."""
    height, width, channels = model.encode(source[0]["image"][None]).shape[1:]
    config = model.config._asdict()
    return {
        "vae": {k: list(v) if isinstance(v, tuple) else v for k, v in config.items()},
        "vae_digests": autoencoder.read_digests(options.vae),
        "split": options.split,
        "size": options.size,
        "dtype": options.dtype,
        "examples_per_shard": options.examples_per_shard,
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
        text = words.count(count, "image")
        logging.info("encoded %s, each with its mirror image, %.1f images/s", text, rate)
    barrier("encoded")
    if jax.process_index() == 0:
        latents.finish(out, plan, ranges, source.class_names)
        logging.info("finished %s: %s", out, words.count(len(source), "example"))


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
    manifest = latents.finished(out)
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
    checked = words.count(len(indices), "example")
    print(f"{verdict}: {checked}, off by at most {worst:.1e} of the largest moment")
    return 0 if worst <= bound else 1


def barrier(name):
    """Waits until every process has reached this point."""
    if jax.process_count() > 1:
        compat.sync_processes(name)
