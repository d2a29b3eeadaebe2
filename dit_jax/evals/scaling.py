"""Studies of runs in numbers: scores against Gflops (Peebles & Xie 2023, sec. 5), steps and time.

A receipt is the content of a receipt.json of dit-evaluate. Gflops are multiply-adds, as in the
paper.
"""

import json
import math
import reprlib
from typing import NamedTuple

import numpy as np

from dit_jax import settings
from dit_jax.errors import UserError

LOWER_IS_BETTER = ("fid", "sfid", "frechet", "kid")  # how the names of such scores begin
GUIDANCE = ("cfg_channels", "cfg_interval", "cfg_schedule")
AGREEMENT = "agreement with the label"
TIMES = {"hours": 3600, "minutes": 60, "seconds": 1}  # in seconds


class Run(NamedTuple):
    """A trained model, or the mean of its repetitions with several seeds: see `pool`.

    design: what tells it from other runs of the same size and patch. receipts: one a step,
    ascending. losses: (steps, smoothed losses). times: (steps, seconds of training until then),
    None if the record has no speed. passes: what an example of a training step costs, in forward
    passes; 3, as the paper counts, for a forward and backward pass.
    """

    size: str
    patch_size: int
    design: str
    batch_size: int
    receipts: list
    losses: tuple
    times: tuple | None = None
    seeds: int = 1
    passes: float = 3

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
        """The estimate of fig. 9: model Gflops x batch size x steps x passes."""
        return self.gflops * self.batch_size * step * self.passes

    def receipt_at(self, step):
        return self.receipts[self.steps.index(step)]

    def loss_at(self, step):
        """The smoothed loss at a step, interpolated."""
        return float(np.interp(step, *self.losses))

    def seconds_at(self, step):
        """The seconds of training until a step, interpolated; None if they are not known."""
        return None if self.times is None else float(np.interp(step, *self.times))


def pool(runs):
    """The mean of repetitions, as one Run, at the steps at which all of them have a receipt.

    The deviation of a score is the one between the repetitions. A single run stays as it is.
    """
    first = runs[0]
    if len(runs) == 1:
        return first
    steps = set.intersection(*(set(run.steps) for run in runs))
    return first._replace(
        receipts=[_pool_receipts([run.receipt_at(step) for run in runs]) for step in sorted(steps)],
        losses=_pool_curves([run.losses for run in runs]),
        times=_pool_curves([run.times for run in runs]) if all(run.times for run in runs) else None,
        seeds=len(runs),
    )


def _pool_receipts(receipts):
    """The first receipt, with the means and the deviations of the scores that all have."""
    scores = {}
    for name in receipts[0]["scores"]:
        if all(name in receipt["scores"] for receipt in receipts):
            values = [value(receipt, name) for receipt in receipts]
            deviation = float(np.std(values, ddof=1))
            scores[name] = {"value": float(np.mean(values)), "deviation": deviation}
    return receipts[0] | {"scores": scores}


def _pool_curves(curves):
    """The mean of curves (x, y) at the x of the first."""
    x = curves[0][0]
    return x, np.mean([np.interp(x, *curve) for curve in curves], axis=0).tolist()


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
        found = "; ".join(f"{run.model} {run.design}: {run.steps}" for run in runs)
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
    known = samples.get("sampling") or {}  # an older receipt lacks what was not an option yet
    usual = json.loads(json.dumps(vars(settings.Sampling())))  # a receipt has lists, no tuples
    sampling = usual | known if known else {}
    sampling = {k: v for k, v in sampling.items() if k not in free}
    if sampling.get("cfg_scale") == 1:  # the other fields of guidance mean nothing
        sampling = {k: v for k, v in sampling.items() if k not in GUIDANCE}
    fields = {name: samples.get(name) for name in ("count", "weights", "labels", "vae")}
    fields |= {"network": receipt.get("network"), "reference": receipt.get("reference")}
    return fields | {f"sampling.{name}": value for name, value in sampling.items()}


def rows(runs, step, score):
    """[{column: value}] of a table: a row for each run at a step."""
    return [
        {
            "model": run.model,
            "design": run.design,
            "num_params": run.num_params,
            "gflops": run.gflops,
            "loss": run.loss_at(step),
            "score": value(run.receipt_at(step), score),
            "deviation": deviation(run.receipt_at(step), score),
            "seeds": run.seeds,
        }
        for run in runs
    ]


def table(rows, score):
    """The text of a table of `rows`."""
    width = max(16, *(len(row["design"]) for row in rows))
    lines = [
        f"{'model':6} {'design':{width}} {'parameters':>12} {'Gflops':>8} {'loss':>7}  {score}"
    ]
    for row in rows:
        spread = f" +- {row['deviation']:.2g}" if row["deviation"] else ""
        seeds = f" of {row['seeds']} seeds" if row["seeds"] > 1 else ""
        lines.append(
            f"{row['model']:6} {row['design']:{width}} {row['num_params']:12,} "
            f"{row['gflops']:8.4g} {row['loss']:7.4f}  {row['score']:.4g}{spread}{seeds}"
        )
    return "\n".join(lines)


def steps_until(run, score, target):
    """The step at which a run's score first is as good as a target; None if it never is.

    Interpolated between the steps with scores. The first of them if its score is good enough.
    """
    sign = 1 if lower_is_better(score) else -1
    missing = [sign * (value(receipt, score) - target) for receipt in run.receipts]
    i = next((i for i, each in enumerate(missing) if each <= 0), None)
    if not i:
        return None if i is None else run.steps[0]
    share = missing[i - 1] / (missing[i - 1] - missing[i])
    return run.steps[i - 1] + share * (run.steps[i] - run.steps[i - 1])


def races(runs, step, score, reference):
    """[{column: value}]: when each run was as good as the reference is at a step; None if never.

    runs: the designs of one model. reference: one of them.
    """
    target = value(reference.receipt_at(step), score)
    found = []
    for run in runs:
        until, receipt = steps_until(run, score, target), run.receipt_at(step)
        found.append(
            {
                "model": run.model,
                "design": run.design,
                "reference": reference.design,
                "target": target,
                "seconds": run.seconds_at(step),
                "until_step": until,
                "until_seconds": None if until is None else run.seconds_at(until),
                "agreement": receipt["scores"].get(AGREEMENT, {}).get("value"),
            }
        )
    return found


def race_table(rows):
    """The text of a table of `races`."""
    width = max(16, *(len(row["design"]) for row in rows))
    unit, size = time_unit([row["seconds"] for row in rows])
    specs = {unit: ".3g", "until step": ",.0f", f"until {unit}": ".3g", AGREEMENT: ".1%"}
    lines = [[f"{'design':{width}}", *(f"{head:>8}" for head in specs)]]
    for row in rows:
        times = [row[name] and row[name] / size for name in ("seconds", "until_seconds")]
        cells = (times[0], row["until_step"], times[1], row["agreement"])
        texts = [
            "-" if x is None else format(x, y) for x, y in zip(cells, specs.values(), strict=True)
        ]
        texts = [f"{text:>{len(head)}}" for text, head in zip(texts, lines[0][1:], strict=True)]
        lines.append([f"{row['design']:{width}}", *texts])
    return "\n".join(map("  ".join, lines))


def time_unit(seconds):
    """(name of the unit in which the longest of some times is at least 3, its seconds)."""
    longest = max((each for each in seconds if each is not None), default=0)
    return next((each for each in TIMES.items() if longest >= 3 * each[1]), ("seconds", 1))


def calls(receipt):
    """How often the network was called for a sample: in each step once, unless the receipt says."""
    steps = str(receipt["samples"]["sampling"]["num_steps"])
    return receipt["model"].get("calls") or int(steps.removeprefix("ddim"))
