"""Judges generated digits by three scores, each with the score of real digits to compare."""

import numpy as np
from sklearn.svm import SVC

from dit_jax.data import digits
from dit_jax.evals import scores

NUM_GUIDED = 1000
NUM_UNGUIDED = digits.NUM_TRAIN  # the same number of samples as for the score of real digits


def labels(count, classes=()):
    """Labels 0, 1, ..., 9, 0, 1, ..., or fewer for a model of some classes: (count,) int32."""
    return (np.arange(count) % (len(classes) or digits.NUM_CLASSES)).astype(np.int32)


def judge(guided, unguided, classes=()):
    """{name: score} of samples uint8 (N, 8, 8, 1), drawn for `labels(N)` with and without guidance.

    classes: data.classes of the model's config. All training and held-out digits below are of
    these classes.

    agreement: share of the guided samples that a classifier (SVC, fitted on the training digits)
    assigns to the requested class. agreement_by_label: the same for each label.
    classifier_accuracy: its accuracy on held-out digits.
    frechet_distance: from the unguided samples to the held-out digits, on pixels in [-1, 1].
    frechet_floor: the same from the training digits.
    nearest_distance: median distance from an unguided sample to the nearest training digit.
    nearest_distance_held_out: the same from a held-out digit. A much smaller nearest_distance would
    mean that the model memorised its training data.
    """
    train, held_out = digits.load(classes)
    classifier = fit_classifier(train)
    requested = labels(len(guided), classes)
    agrees = classifier.predict(pixels(guided)) == requested
    x, x_train, x_held_out = (pixels(s) for s in (unguided, train.image, held_out.image))
    return {
        "agreement": float(agrees.mean()),
        "agreement_by_label": [float(agrees[requested == y].mean()) for y in np.unique(requested)],
        "classifier_accuracy": float(classifier.score(x_held_out, held_out.label)),
        "frechet_distance": scores.frechet_distance_of(x, x_held_out),
        "frechet_floor": scores.frechet_distance_of(x_train, x_held_out),
        "nearest_distance": float(np.median(scores.nearest_distances(x, x_train))),
        "nearest_distance_held_out": float(
            np.median(scores.nearest_distances(x_held_out, x_train))
        ),
    }


def fit_classifier(train):
    """A support vector classifier of pixels in [-1, 1]."""
    return SVC(C=10, gamma=0.02).fit(pixels(train.image), train.label)


def pixels(image):
    """uint8 (N, 8, 8, 1) -> float64 in [-1, 1], (N, 64)."""
    return image.reshape(len(image), -1) / 127.5 - 1


def report(judgments):
    """The scores as lines of text, with the score of real digits in parentheses."""
    j = judgments
    by_label = "  ".join(f"{share:.0%}" for share in j["agreement_by_label"])
    return "\n".join(
        [
            f"agreement with the requested class   {j['agreement']:.1%}"
            f"   (classifier on held-out digits: {j['classifier_accuracy']:.1%})",
            f"agreement for label 0, 1, ...        {by_label}",
            f"Frechet distance, no guidance        {j['frechet_distance']:.3f}"
            f"   (training digits: {j['frechet_floor']:.3f})",
            f"distance to nearest training digit   {j['nearest_distance']:.3f}"
            f"   (held-out digits: {j['nearest_distance_held_out']:.3f})",
        ]
    )
