"""The scores of samples against a reference, each under the name that its definition allows.

Shapes: N samples, M reference images, D features.
"""

import functools
from typing import NamedTuple

import numpy as np

from dit_jax.errors import UserError
from dit_jax.evals import kernel, neighbours, scores

FEWEST = neighbours.DENSITY_K + 1  # images that all scores need
MANY = 10_000  # images; KID of more samples is computed on random subsets
WIDE = 512  # features above which the deviation of a Frechet distance takes minutes
SORTED = 0.9  # a smaller ratio of Inception Scores means that images are sorted


class Reference(NamedTuple):
    """What samples are compared with: Gaussians of all images, and features of some."""

    pool: scores.Gaussian
    spatial: scores.Gaussian | None
    images: np.ndarray | None  # (M, D) features `pool` of the images of precision and recall
    identity: dict  # JSON, for the receipt


class Score(NamedTuple):
    value: float
    deviation: float | None  # of the bootstrap; None: it was not computed


def check(count, *, at_infinity=False):
    """UserError if `judge` needs more samples."""
    if count < FEWEST:
        raise UserError(f"samples must be at least {FEWEST} to be judged, got {count}")
    least = scores.SMALLEST + scores.NUM_SIZES
    if at_infinity and count < least:
        raise UserError(f"num_samples must be at least {least} for fid_infinity, got {count}")


def judge(found, reference, network, *, resamples=None, at_infinity=False):
    """{name: Score} of the features of samples, {"pool": (N, D), ...} with `label` (N,).

    resamples: of the bootstrap; None: 20, and none for the Frechet distance of many features, which
    takes half a minute for each. at_infinity: FID-infinity too. UserError if there are too few
    samples.
    """
    check(len(found["pool"]), at_infinity=at_infinity)
    some = 20 if resamples is None else resamples
    results = _frechet(found, reference, network, resamples, at_infinity)
    if network.is_inception:
        results["Inception Score"] = _score(_inception_score, some, found["logits"])
    if reference.images is not None:
        results |= _neighbours(found["pool"], reference.images, network, some)
        results |= _kernel(found["pool"], reference.images)
    labels = found["label"]
    if not network.is_inception and (labels >= 0).all():
        agrees = found["logits"].argmax(axis=1) == labels
        results["agreement with the label"] = _score(np.mean, some, agrees)
    return results


def names(network, count):
    """(of the Frechet distance of `pool`, of that of `spatial`): only ADM's is called FID."""
    if network.published:
        return f"FID-{_short(count)}", f"sFID-{_short(count)}"
    kind = "Inception with other weights" if network.is_inception else "classifier features"
    return f"Frechet distance ({kind})", f"spatial Frechet distance ({kind})"


def _short(count):
    return f"{count // 1000}K" if count % 1000 == 0 else str(count)


def _frechet(found, reference, network, resamples, at_infinity):
    results = {}
    pairs = zip(
        names(network, len(found["pool"])),
        ("pool", "spatial"),
        (reference.pool, reference.spatial),
        strict=True,
    )
    for name, kind, gaussian in pairs:
        if gaussian is None or kind not in found:
            continue
        x = found[kind]
        times = (0 if x.shape[1] > WIDE else 20) if resamples is None else resamples
        results[name] = _score(functools.partial(_distance, to=gaussian), times, x)
    if at_infinity:
        name = names(network, len(found["pool"]))[0].partition("-")[0] + "-infinity"
        value = scores.frechet_at_infinity(found["pool"], reference.pool).value
        results[name] = Score(value, None)
    return results


def _distance(features, *, to):
    return scores.distance(scores.gaussian_of(features), to)


def _inception_score(logits):
    return scores.inception_scores(logits).mean()


def _score(function, resamples, x):
    deviation = scores.standard_deviation(function, x, resamples=resamples) if resamples else None
    return Score(float(function(x)), deviation)


def _neighbours(samples, images, network, resamples):
    """Precision and recall as ADM rounds them if the network is its own, and without rounding."""
    results = {}
    kinds = {"float16": "", "float32": " (float32)"} if network.is_inception else {"float32": ""}
    for arithmetic, suffix in kinds.items():
        members = neighbours.compare(images, samples, arithmetic=arithmetic)
        for name in ("precision", "recall"):
            results[name + suffix] = _score(np.mean, resamples, getattr(members, name))
    for name in ("density", "coverage"):
        results[name] = _score(np.mean, resamples, getattr(members, name))
    return results


def _kernel(samples, images):
    if max(len(samples), len(images)) <= MANY:
        return {"KID": Score(kernel.distance(samples, images), None)}
    size = min(kernel.SUBSET, len(samples), len(images))
    found = kernel.distances(samples, images, size=size)
    return {f"KID of {len(found)} subsets": Score(float(found.mean()), float(found.std()))}


def looks_sorted(logits):
    """Whether images follow each other by class, which spoils the Inception Score."""
    return len(logits) >= 100 and scores.order_ratio(logits) < SORTED


def report(results):
    """The scores as lines of text."""
    width = max(map(len, results))
    return "\n".join(
        f"{name:{width}s}  {_digits(score.value)}"
        + (f" +- {_digits(score.deviation)}" if score.deviation is not None else "")
        for name, score in results.items()
    )


def _digits(value):
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:.1f}"
