"""Scores a run while it trains: how far the samples of its EMA are from its training images.

The distances are between features of a classifier that is fitted to the training images, once for a
run, and kept in WORKDIR/evaluation/classifier. Samples have the same noise and labels always.
"""

import time

import jax
from absl import logging

from dit_jax.errors import UserError
from dit_jax.evals import classifier, kernel, scores, training_images
from dit_jax.machine import cluster
from dit_jax.runs import record
from dit_jax.sampling import generate

SEED = 0  # of the noise, the labels, the classifier and the choice of training images
MAX_FITTED = 60_000  # training images that the classifier is fitted to
MAX_REFERENCE = 10_000  # training images that samples are compared with


def check(settings, fed):
    """UserError if the Settings ask for scores of samples that cannot be scored."""
    every = settings.run.score_every
    if not every:
        return
    reason = None
    try:
        training_images.check(settings, fed)
    except UserError as error:
        reason = str(error)
    if settings.model.num_classes < 2:
        reason = "a classifier needs 2 classes or more"
    if reason:
        raise UserError(f"run.score_every must be 0 for this run, got {every}: {reason}")


class Scorer:
    """score(step, state) -> {name: float} of `record.SCORES`.

    Every process must call it, and gets the same. Process 0 alone computes features and writes. The
    result is {} if samples are not finite.
    """

    def __init__(self, settings, parts, fed, workdir):
        self._settings, self._parts, self._fed = settings, parts, fed
        self._path = workdir / "evaluation" / "classifier"
        count, num_classes = settings.run.score_samples, parts.model.num_classes
        self._labels = generate.random_labels(SEED, 0, count, num_classes)
        self._network = self._reference = None  # on process 0, from the first score on

    def __call__(self, step, state):
        started = time.perf_counter()
        try:
            samples = self._sample(state.ema)
        except UserError as error:  # on every process
            logging.warning("samples of step %d could not be scored: %s", step, error)
            return {}
        if not self._network:
            self._prepare()
        values = [0.0] * len(record.SCORES)
        with cluster.together():
            if jax.process_index() == 0:
                values = self._compare(samples)
        found = dict(zip(record.SCORES, cluster.of_first(values), strict=True))
        logging.info(
            "step %d: %s; %d samples, %.1f s",
            *(step, ", ".join(f"{record.SCORES[name]} {x:.4g}" for name, x in found.items())),
            *(len(samples), time.perf_counter() - started),
        )
        return found

    def _sample(self, ema):
        """Images of the EMA, uint8, on every process."""
        train, decoder = self._settings.train, self._fed.decoder
        size = train.batch_size // train.accumulation_steps  # that fits the devices
        generated = self._parts.generate
        images = generate.run(generated, ema, self._labels, seed=SEED, batch_size=size)
        return decoder.decode(images) if decoder else images

    def _prepare(self):
        """Opens or fits the classifier, and computes the features of training images."""
        drawn = training_images.draw(self._settings, MAX_FITTED, seed=SEED, fed=self._fed)
        self._network = True
        with cluster.together():
            if jax.process_index() == 0:
                num_classes = self._parts.model.num_classes
                self._network = classifier.open_or_fit(self._path, drawn, num_classes)
                self._reference = self._network(drawn.image[:MAX_REFERENCE])["pool"]

    def _compare(self, samples):
        features = self._network(samples)["pool"]
        frechet = scores.frechet_distance_of(features, self._reference)
        return [frechet, kernel.distance(features, self._reference)]


def is_missed(settings, records, start):
    """Whether a run that resumes from step `start` still has to score it, by its records."""
    every = settings.run.score_every
    known = any(each["step"] == start and "frechet_distance" in each for each in records)
    return bool(every and start and start % every == 0 and not known)
