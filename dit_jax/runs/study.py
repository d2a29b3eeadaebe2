"""The scaling study: the paper's figures and a table from a folder of trained and scored runs.

Every run has its scores in scores/STEP/receipt.json, each written by dit-evaluate.
"""

import json

from dit_jax import settings as settings_lib
from dit_jax.errors import UserError
from dit_jax.evals import plots, receipt, scaling
from dit_jax.machine import disk, words
from dit_jax.runs import own_config, record, summary

DESIGN = "adaln_zero"  # of the models whose sizes are compared
VARIED = ("model.size", "model.patch_size", "model.conditioning")
PAPER = "the paper's twelve models with FID-50K: correlation -0.93, exponent -0.36"


def report(workdir, out, score=None):
    """Draws the study of the runs in a folder into the folder `out`; returns the text to print.

    score: a name in the receipts; None: the first that all of them have. study.json has the table.
    UserError if no run is scored, or if their scores cannot be compared.
    """
    runs, settings, unscored = read(workdir)
    receipts = [each for run in runs for each in run.receipts]
    scaling.check_comparable(receipts)
    score = scaling.common_score(receipts, score)
    step = scaling.common_step(runs)
    out = disk.path(out)
    disk.make_folder(out, "out")
    main = [run for run in runs if run.conditioning == DESIGN]
    trend = None
    if len(main) > 1:
        trend = scaling.trend(
            [run.gflops for run in main],
            [scaling.value(run.receipt_at(step), score) for run in main],
        )
        plots.model_compute(out / "model_compute.png", main, step=step, score=score)
        plots.training_compute(out / "training_compute.png", main, score=score)
        plots.training(out / "training.png", main, score=score)
        plots.losses(out / "losses.png", {run.model: run.losses for run in main})
    for name in dict.fromkeys(run.model for run in runs):
        same = [run for run in runs if run.model == name]
        if len(same) > 1:
            file = out / f"designs_{name.replace('/', '-')}.png"
            plots.designs(file, same, score=score)
    rows = scaling.rows(runs, step, score)
    content = {"score": score, "step": step, "trend": trend and trend._asdict(), "runs": rows}
    disk.write_text(out / "study.json", json.dumps(content, indent=2) + "\n")
    lines = [scaling.table(rows, score), *_remarks(trend, unequal(settings), unscored)]
    samples = words.count(receipts[0]["samples"]["count"], "sample")
    return "\n".join([f"step {step}, {samples} of each model", *lines, f"plots: {out}"])


def read(workdir):
    """([scaling.Run] by Gflops, their Settings, the names of runs without scores) of a folder."""
    folders = [path for path in disk.children(disk.path(workdir)) if summary.is_run(path)]
    receipts = {path: _read_receipts(path / "scores") for path in folders}
    scored = [path for path in folders if receipts[path]]
    if not scored:
        raise UserError(
            f"study must be a folder of runs with scores/STEP/receipt.json, got {workdir}"
        )
    settings = {path: own_config.read_settings(path) for path in scored}
    runs = {path: _make_run(path, settings[path], receipts[path]) for path in scored}
    names = {}
    for path, run in runs.items():
        other = names.setdefault((run.model, run.conditioning), path)
        if other != path:
            raise UserError(
                f"study must have one run of a model and a design, got {other.name} and "
                f"{path.name}, which are both {run.model} {run.conditioning}"
            )
    ordered = sorted(runs.values(), key=lambda run: run.gflops)
    return ordered, list(settings.values()), [p.name for p in folders if not receipts[p]]


def unequal(settings):
    """The names of the fields in which runs differ and should not: all but size and design."""
    found = {}
    for other in settings[1:]:
        for name, _, _ in settings_lib.differences(settings[0], other):
            found[name] = None
    return [name for name in found if name not in VARIED]


def _read_receipts(folder):
    """The receipts of a run's scores, ascending by step."""
    paths = [path / "receipt.json" for path in disk.children(folder)]
    receipts = [_read_receipt(path) for path in paths if disk.exists(path)]
    return sorted(receipts, key=lambda each: each["samples"]["step"])


def _read_receipt(path):
    content = disk.read_json(path)
    missing = [name for name in ("samples", "model", "scores") if not content.get(name)]
    missing += [
        f"{topic}.{name}"
        for topic, name in (("samples", "step"), ("model", "gflops"), ("model", "num_params"))
        if topic not in missing and not _has_number(content[topic], name)
    ]
    if missing:
        raise UserError(f"{path} must be a receipt of a checkpoint, got one without {missing[0]}")
    receipt.check_scores(content["scores"], path)
    return content


def _has_number(topic, name):
    return isinstance(topic, dict) and type(topic.get(name)) in (int, float)


def _make_run(path, settings, receipts):
    records = record.read(path / "metrics.jsonl")
    if not records:
        raise UserError(f"{path / 'metrics.jsonl'} must have a record of the losses, got none")
    steps, means = record.curve(records, "loss")
    model = settings.model
    return scaling.Run(
        size=model.size,
        patch_size=model.patch_size,
        conditioning=model.conditioning,
        batch_size=settings.train.batch_size,
        receipts=receipts,
        losses=(steps, record.smooth(means)),
    )


def _remarks(trend, unequal, unscored):
    """What is said below the table."""
    lines = []
    if trend:
        lines.append(f"correlation of log Gflops and score: {trend.correlation:.2f}")
        if trend.exponent is not None:
            lines.append(f"score ~ Gflops^{trend.exponent:.2f}")
        lines.append(f"({PAPER})")
    if unequal:
        lines.append(f"not comparable: the runs differ in {', '.join(unequal)}")
    if unscored:
        lines.append(f"without scores, left out: {', '.join(unscored)}")
    return lines
