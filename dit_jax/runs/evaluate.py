"""One evaluation: from samples to features, scores, and a receipt with which anyone repeats it.

OUT/features and OUT/reference hold features, OUT/receipt.json the result.
"""

import dataclasses
import functools
import importlib.metadata
import time

import jax
import numpy as np
from absl import logging

from dit_jax import settings as settings_lib
from dit_jax.checkpoint.store import PACKAGES
from dit_jax.data import prepared
from dit_jax.errors import UserError
from dit_jax.evals import (
    classifier,
    features,
    judge,
    presets,
    receipt,
    reference,
    samples,
    scores,
    training_images,
)
from dit_jax.evals.request import home, is_checkpoint
from dit_jax.machine import cluster, devices, disk, words
from dit_jax.models import flops
from dit_jax.sampling import autoencoder, extractor, generate, trained

MAX_TRAINING = 60_000  # images that a classifier is fitted to
MAX_COMPARED = 10_000  # of these, and of held-out images, for precision, recall and KID
NUM_SAMPLES = 1000  # of a model without a preset


class Drawn:
    """Samples of a model, drawn when they are read: image i by the seed, i and a random label."""

    def __init__(self, dit, request, options):
        self.dit, self.seed = dit, request.seed
        self.options = dit.sampling | options
        if dit.space != "pixels" and not dit.decoder:
            raise UserError("--vae must be given for a model of latents, to decode its samples")
        height, width = dit.config.input_size[:2]
        factor = dit.decoder.config.downsampling if dit.decoder else 1
        self.shape = (factor * height, factor * width, 3)
        self.per_device = generate.images_at_once(dit.config)
        self.at_once = self.per_device * jax.device_count()

    def read(self, start, stop):
        count = stop - start
        # Whole batches, since the last bit of a float sum depends on the size of the batch.
        padded = -(-count // self.at_once) * self.at_once
        labels = generate.random_labels(self.seed, start, padded, self.dit.config.num_classes)
        options = {"seed": self.seed, "first": start, "batch_size": self.at_once, **self.options}
        return self.dit.sample(labels, **options)[:count], labels[:count]

    def describe(self, request):
        dit, vae = self.dit, None
        if dit.decoder:
            digest = receipt.digest(autoencoder.read_digests(request.vae))
            vae = {"dtype": request.vae_dtype, "digest": digest}
        return {
            "step": dit.step,
            "weights": dit.weights,
            "digest": dit.digest,
            "sampling": self.options,
            "vae": vae,
            "seed": self.seed,
            "labels": "uniform, by seed and index",
            "per_device": self.per_device,
        }


class Existing:
    """Images that exist already, read as `Drawn` is."""

    at_once = features.SHARD

    def __init__(self, path):
        self.images = samples.open_images(path)
        self.images.check_sizes()
        self.shape = self.images.shape

    def __len__(self):
        return len(self.images)

    def read(self, start, stop):
        return self.images.read(start, stop), None

    def describe(self, request):
        return {"digest": self.images.sha256}


def run(request, out, command, *, kept_in=None):
    """Judges what a Request asks for; prints and returns the receipt, None on other processes.

    out: the folder of features and receipt; a killed evaluation goes on there. command: the words
    that started it, for the receipt. kept_in: the run that keeps the classifier of its data; None:
    the run that is judged. UserError if the request does not fit.
    """
    request.check()
    out = disk.path(out)
    source = open_samples(request)
    count, name, drawn = _count(request, source), None, isinstance(source, Drawn)
    judge.check(count, at_infinity=request.fid_infinity)
    if request.preset:
        name = presets.title(
            request.preset, sampling=source.options, count=count, size=source.shape[:2]
        )
    network, compared, held_out = _open_judges(request, source, out, kept_in or request.samples)
    identity = {"samples": source.describe(request), "network": network and network.identity}
    read = functools.partial(_read_colours, source) if request.inception else source.read
    at_once = source.at_once
    store, seconds = features.fill(
        out / "features", identity, count, read, network, at_once=at_once
    )
    with cluster.together():
        if not store:
            return None
        began = time.perf_counter()
        found = store.read(count)
        options = {"resamples": request.bootstrap, "at_infinity": request.fid_infinity}
        results = judge.judge(found, compared, network, **options)
        content = {
            "name": name,
            "command": command,
            "arguments": dataclasses.asdict(request),
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "samples": {"path": request.samples, "count": count, **identity["samples"]},
            "model": _describe_model(source),
            "network": network.identity,
            "reference": compared.identity,
            "features": store.digests(count),
            "scores": {key: score._asdict() for key, score in results.items()},
            "held_out": {key: score.value for key, score in held_out.items()},
            "devices": devices.describe(),
            "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
            "seconds": seconds._asdict() | {"scores": time.perf_counter() - began},
            "seconds_per_image": source.dit.seconds_per_image if drawn else None,
        }
        receipt.write(out / "receipt.json", content)
    _report(request, source, results, found, name, held_out)
    return content


def make_reference(data, out, *, split, size, inception):
    """Writes the reference of a prepared data set to out, an .npz in ADM's format.

    Features are kept beside it, in a folder with its name, so that a killed start goes on.
    """
    images = prepared.open_images(data, split, size)
    network = extractor.load(inception)
    reference.make(images, network, out.with_name(f"{out.stem}-features"), out)
    logging.info("%s: %s", words.count(len(images), "image"), out)


def open_samples(request, load=trained.load):
    """The Drawn or Existing that the request names. load: as `trained.load`."""
    path = request.samples
    if not is_checkpoint(path):
        return Existing(path)
    options = presets.find(request.preset).sampling if request.preset else {}
    dit = load(path, weights=request.weights, vae=request.vae, vae_dtype=request.vae_dtype)
    return Drawn(dit, request, options | request.sampling)


def _open_judges(request, source, out, kept_in):
    """(network of features, Reference, scores of held-out images) for a request.

    What process 0 alone needs is None on the others.
    """
    if request.inception:
        network = extractor.load(request.inception)
        compared = reference.open_adm(request.reference, network, out / "reference", source.shape)
        return network, compared, {}
    return _open_own_data(source.dit.settings, request, kept_in)


def _open_own_data(settings, request, kept_in):
    """The same for the data that a run was trained on: a classifier of them judges the samples."""
    if request.vae:
        data = dataclasses.replace(settings.data, vae=request.vae)
        settings = dataclasses.replace(settings, data=data)
    drawn = training_images.draw(settings, MAX_TRAINING)
    others = training_images.held_out(settings, MAX_COMPARED)
    with cluster.together():
        if jax.process_index() != 0:
            return None, None, {}
        classes = settings.model.num_classes
        if classes < 2:
            raise UserError(f"checkpoint must be of at least 2 classes to be judged, got {classes}")
        kept = disk.path(home(kept_in)) / "evaluation" / "classifier"  # as in training
        network = classifier.open_or_fit(kept, drawn, classes)
        pool = network(drawn.image)["pool"]
        about = {"training_images": len(pool), "sha256": network.about["data_sha256"]}
        compared = judge.Reference(scores.gaussian_of(pool), None, pool[:MAX_COMPARED], about)
        if others is None or len(others) < judge.FEWEST:
            return network, compared, {}
        found = network(others.image) | {"label": others.label}
        return network, compared, judge.judge(found, compared, network, resamples=0)


def _count(request, source):
    """How many images are judged."""
    if isinstance(source, Drawn):
        default = presets.COUNT if request.preset else NUM_SAMPLES
        return request.num_samples or default
    return request.num_samples or len(source)


def _read_colours(source, start, stop):
    """Images with three channels, as Inception needs them, and their labels."""
    images, labels = source.read(start, stop)
    return np.repeat(images, 3, axis=-1) if images.shape[-1] == 1 else images, labels


def _describe_model(source):
    if not isinstance(source, Drawn):
        return None
    dit = source.dit
    options = settings_lib.read_topic(settings_lib.Sampling, source.options)
    return {
        "name": dit.name,
        "num_params": dit.num_params,
        "gflops": flops.forward_flops(dit.config) / 2e9,  # multiply-adds, as in the paper
        "sampling_gflops": generate.count_flops(dit.config, dit.process, options) / 2e9,
        "calls": generate.count_calls(dit.process, options),
        "passes": generate.count_passes(dit.process, options),
    }


def _report(request, source, results, found, name, held_out):
    """Prints the scores, beside the paper's, and warns of what makes them incomparable."""
    logging.info("%s, %s", words.count(len(found["pool"]), "image"), name or "no preset")
    lines = judge.report(results).splitlines()
    paper = presets.published(request.preset, source.dit.name) if request.preset else {}
    for key, line in zip(results, lines, strict=True):
        beside = {
            "paper": paper.get(key),
            "held-out images": key in held_out and held_out[key].value,
        }
        texts = [f"   ({name}: {value:.4g})" for name, value in beside.items() if value]
        print(line + "".join(texts))
    if "spatial" in found and judge.looks_sorted(found["logits"]):
        logging.warning(
            "%s looks sorted by class: the Inception Score of consecutive images is too low",
            request.samples,
        )
