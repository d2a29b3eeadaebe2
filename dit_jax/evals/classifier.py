"""A classifier of the data itself, whose features judge samples where Inception cannot.

Inception has learned photographs. For digits, clothes and small own pictures, a convolutional
network learns the classes of the data in less than a minute. A Frechet distance between its
features is no FID; it is comparable only with distances by the same classifier.
Shapes: N images, H W grid, C channels, D features, L classes.
"""

import functools
import hashlib
import json
import time

import jax
import numpy as np
import optax
from absl import logging

from dit_jax import compat
from dit_jax.checkpoint import digests, steps, store
from dit_jax.data.arrays import Arrays
from dit_jax.errors import UserError
from dit_jax.machine import disk, prng, sharding
from dit_jax.models import classifier
from dit_jax.sampling import chunks

NUM_STEPS = (
    300,
    1000,
)  # fewest and most; between them EPOCHS, so that few images are not memorised
EPOCHS = 30
BATCH_SIZE = 128
LEARNING_RATE = 2e-3
WARMUP_SHARE = 0.05  # of the steps
WEIGHT_DECAY = 1e-2
HELD_OUT = 0.1  # of the images, to measure the accuracy
SCALED_BY = 5000  # images whose features get the mean square 1
PER_DEVICE = 64  # images at once


def fit(images, labels, num_classes, *, seed=0, mesh=None):
    """The Classifier of uint8 images (N, H, W, C) with labels (N,) in 0 .. num_classes - 1.

    It trains on one device, so that the number of devices does not matter; the seed decides the
    rest. A random tenth of the images is held out, and says how accurate it is. mesh: the devices
    on which it will run; None: all. UserError if images and labels do not fit.
    """
    images, labels = _check(images, labels, num_classes)
    config = classifier.ClassifierConfig(images.shape[1:], num_classes)
    order = np.random.default_rng(seed).permutation(len(images))
    held_out, train = np.split(order, [max(1, int(HELD_OUT * len(order)))])
    started = time.perf_counter()
    with jax.default_device(jax.local_devices()[0]), compat.default_arithmetic():
        params = _train(config, images[train], labels[train], seed)
    about = {
        "data_sha256": Arrays(images, labels, ()).sha256,
        "num_train": len(train),
        "num_held_out": len(held_out),
        "seed": seed,
    }
    network = Classifier(config, params, mesh or sharding.make_mesh(), about)
    found = network(images[held_out])["logits"].argmax(axis=1)
    network.about["held_out_accuracy"] = accuracy = float(np.mean(found == labels[held_out]))
    logging.info(
        "fitted a classifier to %d images in %.1f s: right about %.1f %% of %d held-out images",
        *(len(train), time.perf_counter() - started, 100 * accuracy, len(held_out)),
    )
    return network


def _check(images, labels, num_classes):
    images, labels = chunks.check(images, ("H", "W", "C")), np.asarray(labels)
    if num_classes < 2:
        raise UserError(f"num_classes must be at least 2 for a classifier, got {num_classes}")
    if labels.shape != (len(images),) or labels.dtype.kind not in "iu":
        raise UserError(
            f"labels must be a whole number for each of {len(images)} images, got "
            f"{labels.dtype} {labels.shape}"
        )
    if labels.min() < 0 or labels.max() >= num_classes:
        raise UserError(
            f"labels must be in 0 .. {num_classes - 1}, got {labels.min()} .. {labels.max()}"
        )
    if len(images) < 2:
        raise UserError("images must be at least 2 for a classifier, got 1")
    return images, labels.astype(np.int32)


def _train(config, images, labels, seed):
    """The parameters after training, as NumPy."""
    num_steps = int(np.clip(EPOCHS * len(images) / BATCH_SIZE, *NUM_STEPS))
    warmup_steps = int(WARMUP_SHARE * num_steps)
    rate = optax.warmup_cosine_decay_schedule(0.0, LEARNING_RATE, warmup_steps, num_steps)
    optimizer = optax.adamw(rate, weight_decay=WEIGHT_DECAY)
    apply = classifier.make_apply(config)

    def loss_fn(params, x, y):
        losses = optax.softmax_cross_entropy_with_integer_labels(apply(params, x).logits, y)
        return losses.mean()

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, opt_state, x, y):
        grads = jax.grad(loss_fn)(params, x, y)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    params = classifier.init(config, prng.key(seed))
    opt_state = optimizer.init(params)
    for rows in _batches(len(images), num_steps, seed):
        params, opt_state = step(params, opt_state, images[rows], labels[rows])
    return _normalize(jax.device_get(params), jax.jit(apply), images[:SCALED_BY])


def _normalize(params, apply, images):
    """The same classifier with features of mean square 1: ReLU lets their scale through.

    So distances between features are of one size for all data, about the number of features for
    sets that have nothing in common.
    """
    parts = np.array_split(images, -(-len(images) // BATCH_SIZE))
    found = np.concatenate([apply(params, each).pool for each in parts])
    scale = np.float32(np.sqrt(np.square(found).mean(dtype=np.float64)) or 1)
    features = {name: x / scale for name, x in params["features"].items()}
    logits = params["logits"] | {"kernel": params["logits"]["kernel"] * scale}
    return params | {"features": features, "logits": logits}


def _batches(count, num_steps, seed):
    """Yields the rows of each batch: every epoch has a new random order."""
    rng, rows = np.random.default_rng([seed, 1]), np.empty(0, np.int64)
    for _ in range(num_steps):
        while len(rows) < BATCH_SIZE:
            rows = np.concatenate([rows, rng.permutation(count)])
        yield rows[:BATCH_SIZE]
        rows = rows[BATCH_SIZE:]


class Classifier:
    """A network of features. about: a dict of JSON values that says what it was fitted to."""

    is_inception = published = False  # its scores are not those of papers

    def __init__(self, config, params, mesh, about, *, per_device=PER_DEVICE):
        self.config, self.about = config, about
        everywhere = sharding.replicated(mesh)
        self.params = jax.tree.map(lambda x: sharding.to_global(x, everywhere), params)
        self._run = chunks.InChunks(classifier.make_apply(config), mesh, per_device=per_device)

    def __call__(self, images, *, progress=False):
        """{"pool": (N, D), "logits": (N, L)}, NumPy float32, of uint8 images (N, H, W, C).

        The images must have the shape of those that it was fitted to. progress: shows a bar on a
        terminal.
        """
        images = chunks.check(images, self.config.image_shape)
        return self._run(self.params, images, progress=progress)._asdict()

    @property
    def identity(self):
        """A JSON dict that names the network: its weights, its data and its accuracy."""
        found = json.dumps(digests.of_tree(self.params), sort_keys=True)
        digest = hashlib.sha256(found.encode()).hexdigest()
        return {"network": "classifier", "digest": digest, **self._as_json()}

    def _as_json(self):
        fields = self.config._asdict()
        return fields | {"image_shape": list(self.config.image_shape)} | self.about

    def save(self, path):
        """Writes the checkpoint that `load` opens; of several processes, only process 0 may."""
        params = jax.tree.map(sharding.to_host, self.params)  # Orbax refuses local jax arrays
        with store.open_writer(background=False, alone=True) as writer:
            store.save(writer, path, 0, {"params": params}, {"classifier": self._as_json()})


def open_or_fit(path, drawn, num_classes, *, seed=0):
    """The Classifier of images, Arrays, that `path` keeps; else it is fitted and saved there.

    It runs on one local device; of several processes, only one may call it.
    """
    mesh = sharding.make_mesh(devices=jax.local_devices()[:1])
    if disk.exists(path):
        try:
            kept = load(path, mesh=mesh)
            if kept.about["data_sha256"] == drawn.sha256:
                return kept
            logging.warning("%s is of other images and is fitted anew", path)
        except UserError as error:
            logging.warning("the classifier is fitted anew: %s", error)
    network = fit(drawn.image, drawn.label, num_classes, seed=seed, mesh=mesh)
    try:
        network.save(path)
    except Exception as error:  # files, TensorStore and buckets raise many types
        logging.warning("%s could not be saved: %s", path, store.explain(error))
    return network


def load(path, *, mesh=None):
    """The Classifier that `save` wrote; mesh: the devices on which it runs, None: all.

    UserError if path is no such checkpoint, `store.Damaged` if it cannot be read.
    """
    directory, step = steps.locate(path)
    about = store.read_meta(directory, step, of="classifier")["classifier"]
    config, mesh = classifier.ClassifierConfig.from_json(about), mesh or sharding.make_mesh()
    params = store.restore_params(
        *(directory, step),
        lambda: classifier.init(config, prng.key(0)),
        weights="params",
        mesh=mesh,
    )
    params = jax.tree.map(sharding.to_host, params)
    about = {name: x for name, x in about.items() if name not in config._fields}
    return Classifier(config, params, mesh, about)
