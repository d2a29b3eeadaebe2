"""How good are generated digits? Three judgments, each beside what real digits get."""

import numpy as np
from sklearn.svm import SVC

from dit_jax.data import digits
from dit_jax.evals import scores

NUM_GUIDED = 1000
NUM_UNGUIDED = digits.NUM_TRAIN  # as many as the training digits that set the floor


def labels(count):
    """As many of each class as can be, (count,) int32."""
    return (np.arange(count) % digits.NUM_CLASSES).astype(np.int32)


def judge(guided, unguided):
    """{name: value} of samples drawn for `labels(len(samples))`; uint8 (N, 8, 8, 1) each.

    agreement: share of guided samples that a classifier (SVC, fitted on the training digits) reads
    as the class asked for. frechet_distance: of unguided samples to the held-out digits, pixels in
    [-1, 1]. nearest_distance: median distance of an unguided sample to the nearest training digit;
    far below that of held-out digits it would mean that the model recites. Beside each stands
    what real digits get: classifier_accuracy, frechet_floor, nearest_distance_held_out.
    """
    train, held_out = digits.load()
    classifier = fit_classifier(train)
    x, x_train, x_held_out = (pixels(s) for s in (unguided, train.image, held_out.image))
    asked = labels(len(guided))
    return {
        "agreement": float(classifier.score(pixels(guided), asked)),
        "classifier_accuracy": float(classifier.score(x_held_out, held_out.label)),
        "frechet_distance": scores.frechet_distance_of(x, x_held_out),
        "frechet_floor": scores.frechet_distance_of(x_train, x_held_out),
        "nearest_distance": float(np.median(scores.nearest_distances(x, x_train))),
        "nearest_distance_held_out": float(
            np.median(scores.nearest_distances(x_held_out, x_train))
        ),
    }


def fit_classifier(train):
    """The judge: a support vector classifier of pixels in [-1, 1]."""
    return SVC(C=10, gamma=0.02).fit(pixels(train.image), train.label)


def pixels(image):
    """uint8 (N, 8, 8, 1) -> float64 in [-1, 1], (N, 64)."""
    return image.reshape(len(image), -1) / 127.5 - 1


def report(judgments):
    """The judgments as lines of text, each beside what real digits get."""
    j = judgments
    return "\n".join(
        [
            f"agreement with the class asked for   {j['agreement']:.1%}"
            f"   (classifier on held-out digits: {j['classifier_accuracy']:.1%})",
            f"Frechet distance, no guidance        {j['frechet_distance']:.3f}"
            f"   (training digits: {j['frechet_floor']:.3f})",
            f"distance to nearest training digit   {j['nearest_distance']:.3f}"
            f"   (held-out digits: {j['nearest_distance_held_out']:.3f})",
        ]
    )
