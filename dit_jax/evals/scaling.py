"""The scaling study (Peebles & Xie 2023, sec. 5) in numbers: scores against Gflops and steps.

A receipt is the content of a receipt.json of dit-evaluate. Gflops are multiply-adds, as in the
paper.
"""

import math
import reprlib
from typing import NamedTuple

import numpy as np

from dit_jax.errors import UserError

LOWER_IS_BETTER = ("fid", "sfid", "frechet", "kid")  # how the names of such scores begin
BACKWARD = 3  # a training step costs three forward passes, as the paper counts


class Run(NamedTuple):
    """A trained model: its size and design, and its receipts, one a step, ascending."""

    size: str
    patch_size: int
    conditioning: str
    batch_size: int
    receipts: list
    losses: tuple  # (steps, smoothed losses)

    @property
    def model(self):
        """The name of the model without its design, such as "Ti/4"."""
        return f"{self.size}/{self.patch_size}"

    @property
    def gflops(self):
        """Of one forward pass of one image."""
        return self.receipts[-1]["model"]["gflops"]

    @property
    def num_params(self):
        return self.receipts[-1]["model"]["num_params"]

    @property
    def steps(self):
        return [receipt["samples"]["step"] for receipt in self.receipts]

    def training_gflops(self, step):
        """The estimate of fig. 9: model Gflops x batch size x steps x 3."""
        return self.gflops * self.batch_size * step * BACKWARD

    def receipt_at(self, step):
        return self.receipts[self.steps.index(step)]

    def loss_at(self, step):
        """The smoothed loss at a step, interpolated."""
        return float(np.interp(step, *self.losses))


class Trend(NamedTuple):
    """How scores go with Gflops.

    correlation: Pearson's, of log Gflops and score, as under fig. 8: -0.93 for the paper's models.
    exponent, factor: of the line in log-log, score = factor * gflops ** exponent; None if a score
    is not positive.
    """

    correlation: float
    exponent: float | None
    factor: float | None


def trend(gflops, scores):
    """The Trend of at least 3 models; None for fewer, or where all have the same Gflops or score.

    Two points are always on a line.
    """
    if len(gflops) < 3 or len(set(gflops)) == 1 or len(set(scores)) == 1:
        return None
    x = np.log(gflops)
    correlation = float(np.corrcoef(x, scores)[0, 1])
    if min(scores) <= 0:
        return Trend(correlation, None, None)
    exponent, intercept = np.polyfit(x, np.log(scores), 1)
    return Trend(correlation, float(exponent), float(np.exp(intercept)))


def lower_is_better(score):
    """Whether a low score of this name is good: true of distances."""
    return score.lower().startswith(LOWER_IS_BETTER)


def value(receipt, score):
    return receipt["scores"][score]["value"]


def deviation(receipt, score):
    """The standard deviation of a score; None if it was not computed."""
    return receipt["scores"][score].get("deviation")


def common_score(receipts, score=None):
    """The name of a score that all receipts have: the given one, else the first.

    UserError if there is none, or if it is not a finite number everywhere.
    """
    names = [name for name in receipts[0]["scores"] if all(name in r["scores"] for r in receipts)]
    if not names:
        found = sorted({name for receipt in receipts for name in receipt["scores"]})
        raise UserError(f"receipts must have a score in common, got {', '.join(found)}")
    if score is not None and score not in names:
        raise UserError(f"score must be one of {', '.join(names)}, got {score!r}")
    score = names[0] if score is None else score
    for receipt in receipts:
        if not math.isfinite(value(receipt, score)):
            where = receipt["samples"].get("path")
            raise UserError(
                f"{score} must be finite in all receipts, got {value(receipt, score)} of {where}"
            )
    return score


def common_step(runs):
    """The last step at which all runs have a receipt; UserError if there is none."""
    steps = set.intersection(*(set(run.steps) for run in runs))
    if not steps:
        found = "; ".join(f"{run.model} {run.conditioning}: {run.steps}" for run in runs)
        raise UserError(f"runs must be scored at one common step, got {found}")
    return max(steps)


def check_comparable(receipts, *, free=()):
    """UserError if receipts differ in the network, the reference or how samples were drawn.

    free: fields of sampling that may differ, such as the one that a sweep varies.
    """
    first = _circumstances(receipts[0], free)
    for receipt in receipts[1:]:
        for name, found in _circumstances(receipt, free).items():
            if found != first.get(name):
                where = [r["samples"].get("path") for r in (receipts[0], receipt)]
                shown = [reprlib.repr(x) for x in _without_common(first.get(name), found)]
                raise UserError(
                    f"receipts must have the same {name}, got {shown[0]} of {where[0]} and "
                    f"{shown[1]} of {where[1]}"
                )


def _without_common(a, b):
    """Two values that differ; of two dicts only what differs, so that a short text shows it."""
    if not (isinstance(a, dict) and isinstance(b, dict)):
        return a, b
    return [{k: v for k, v in x.items() if y.get(k) != v} for x, y in ((a, b), (b, a))]


def _circumstances(receipt, free):
    """{name: value} of what decides whether scores can be compared."""
    samples = receipt["samples"]
    sampling = {k: v for k, v in (samples.get("sampling") or {}).items() if k not in free}
    fields = {name: samples.get(name) for name in ("count", "weights", "labels", "vae")}
    fields |= {"network": receipt.get("network"), "reference": receipt.get("reference")}
    return fields | {f"sampling.{name}": value for name, value in sampling.items()}


def rows(runs, step, score):
    """[{column: value}] of a table: a row for each run at a step."""
    result = []
    for run in runs:
        receipt = run.receipt_at(step)
        result.append(
            {
                "model": run.model,
                "design": run.conditioning,
                "num_params": run.num_params,
                "gflops": run.gflops,
                "loss": run.loss_at(step),
                "score": value(receipt, score),
                "deviation": deviation(receipt, score),
            }
        )
    return result


def table(rows, score):
    """The text of a table of `rows`."""
    lines = [f"{'model':6} {'design':16} {'parameters':>12} {'Gflops':>8} {'loss':>7}  {score}"]
    for row in rows:
        spread = f" +- {row['deviation']:.2g}" if row["deviation"] else ""
        lines.append(
            f"{row['model']:6} {row['design']:16} {row['num_params']:12,} {row['gflops']:8.4g} "
            f"{row['loss']:7.4f}  {row['score']:.4g}{spread}"
        )
    return "\n".join(lines)
