"""Studies: figures and a table from a folder of trained and scored runs.

The runs differ in size, as those of the paper, or in other settings: the design of a block, the
objective, the optimizer. Runs that differ in the seed only are repetitions, of which the mean is
shown. Every run has its scores in scores/STEP/receipt.json, each written by dit-evaluate.
"""

import json
from typing import NamedTuple

import numpy as np

from dit_jax import settings as settings_lib
from dit_jax.diffusion import fields as diffusion_fields
from dit_jax.errors import UserError
from dit_jax.evals import plots, receipt, scaling
from dit_jax.machine import disk, words
from dit_jax.runs import build, history, own_config, record, summary

CONDITIONING = "model.conditioning"  # named without its field, as in the paper
APART = ("seed", "model.size", "model.patch_size")  # fields that are no part of a design
DEFAULT = "default"  # the design whose fields all have their default values
PAPER = "the paper's twelve models with FID-50K: correlation -0.93, exponent -0.36"


class Found(NamedTuple):
    """What a folder holds.

    runs: scaling.Runs by Gflops, the mean of each group of repetitions. settings: of all scored
    runs. shown: the fields in the names of their designs. count: samples of a score. unscored: the
    names of runs without scores. machines: what the runs were trained on.
    """

    runs: list
    settings: list
    shown: list
    step: int
    score: str
    count: int
    unscored: list
    machines: list


def report(workdir, out, score=None, reference=None):
    """Draws the study of the runs in a folder into the folder `out`; returns the text to print.

    score: a name in the receipts; None: the first that all of them have. reference: the design
    with which the others are compared; None: the one that differs least from the default values.
    study.json has the tables. UserError if no run is scored, or if their scores cannot be compared.
    """
    found = read(workdir, score)
    reference = _find_reference(found, reference)
    out = disk.path(out)
    disk.make_folder(out, "out")
    trend = _draw_sizes(out, [run for run in found.runs if run.design == reference], found)
    races = []
    for name in dict.fromkeys(run.model for run in found.runs):
        same = [run for run in found.runs if run.model == name]
        if len(same) > 1:
            races.append(_compare_designs(out, same, found, reference))
    rows = scaling.rows(found.runs, found.step, found.score)
    content = {"score": found.score, "step": found.step, "reference": reference}
    content |= {"trend": trend and trend._asdict(), "runs": rows, "races": sum(races, [])}
    disk.write_text(out / "study.json", json.dumps(content, indent=2) + "\n")
    samples = words.count(found.count, "sample")
    return "\n".join(
        [
            f"step {found.step}, {samples} of each model",
            *(scaling.table(rows, found.score), *_say_races(races, found)),
            *(*_remarks(trend, found), f"plots: {out}"),
        ]
    )


def read(workdir, score=None):
    """What is Found in a folder; UserError if no run is scored or their scores do not compare."""
    folders = [path for path in disk.children(disk.path(workdir)) if summary.is_run(path)]
    receipts = {path: _read_receipts(path / "scores") for path in folders}
    scored = [path for path in folders if receipts[path]]
    if not scored:
        raise UserError(
            f"study must be a folder of runs with scores/STEP/receipt.json, got {workdir}"
        )
    settings = {path: own_config.read_settings(path) for path in scored}
    shown, groups = shown_fields(list(settings.values())), {}
    for path, each in settings.items():
        run = _make_run(path, each, design(each, shown), receipts[path])
        seeds = groups.setdefault((run.model, run.design), {})
        _, other = seeds.setdefault(each.seed, (run, path))
        if other != path:
            raise UserError(
                f"study must have one run of a model, design and seed, got {other.name} and "
                f"{path.name}, which are both {run.model} {run.design}, seed {each.seed}"
            )
    groups = [[run for run, _ in seeds.values()] for seeds in groups.values()]
    every = [each for path in scored for each in receipts[path]]
    scaling.check_comparable(every)
    events = [event for path in scored for event in history.read(path)]
    return Found(
        score=scaling.common_score(every, score),
        step=scaling.common_step([run for group in groups for run in group]),
        runs=sorted(map(scaling.pool, groups), key=lambda run: run.gflops),
        settings=list(settings.values()),
        shown=shown,
        count=every[0]["samples"]["count"],
        unscored=[path.name for path in folders if not receipts[path]],
        machines=sorted({event["devices"] for event in events if "devices" in event}),
    )


def varied(settings):
    """The fields, as TOPIC.FIELD, in which runs differ; without the seed, size and patch."""
    found = set()
    for other in settings[1:]:
        found |= {name for name, _, _ in settings_lib.differences(settings[0], other)}
    return [name for name in settings_lib.defaults() if name in found.difference(APART)]


def compared(settings):
    """The fields that are compared: those in which runs of one size and patch differ."""
    models = {}
    for each in settings:
        models.setdefault((each.model.size, each.model.patch_size), []).append(each)
    found = {name for same in models.values() for name in varied(same)}
    return [name for name in varied(settings) if name in found]


def shown_fields(settings):
    """The compared fields that some run sets to a value that does not follow from the others."""
    names = compared(settings)
    said = {name for each in settings for name in _said(each, names)}
    return [name for name in names if name in said]


def design(settings, shown):
    """The name of a run's design: the values of the shown fields that are not the default ones."""
    if len(shown) > 1:
        return _name(settings, _said(settings, shown)) or DEFAULT
    return _name(settings, shown or [CONDITIONING])


def _said(settings, names):
    """The fields that have to be said: without them, the others give other settings.

    A path, for example, learns no variance and predicts the velocity unless a config says so.
    """
    fields, said = settings_lib.to_json(settings), []
    for name in names:
        topic, _, field = name.partition(".")
        rest = {key: value for key, value in fields[topic].items() if key != field}
        try:
            follows = settings_lib.read(fields | {topic: rest}) == settings
        except UserError:
            follows = False
        if follows:
            fields |= {topic: rest}
        else:
            said.append(name)
    return said


def _name(settings, names):
    """FIELD=VALUE of some fields; with its topic if a field of another topic has the same name."""
    values, texts = settings_lib.flat(settings), []
    fields = [name.rpartition(".")[2] for name in values]
    for name in names:
        field = name.rpartition(".")[2]
        short = name if fields.count(field) > 1 else field
        texts.append(values[name] if name == CONDITIONING else f"{short}={values[name]}")
    return ", ".join(texts)


def _find_reference(found, name):
    """The design of this name. None: the one with the fewest values that are not the default."""
    shown = found.shown
    counts = {design(each, shown): len(_said(each, shown)) for each in found.settings}
    if name is None:
        return min(counts, key=lambda each: (counts[each], each))
    if name not in counts:
        raise UserError(f"reference must be one of {'; '.join(counts)}, got {name!r}")
    return name


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


def _make_run(path, settings, design, receipts):
    records = record.read(path / "metrics.jsonl")
    if not records:
        raise UserError(f"{path / 'metrics.jsonl'} must have a record of the losses, got none")
    steps, means = record.curve(records, diffusion_fields.watched(settings.diffusion))
    return scaling.Run(
        size=settings.model.size,
        patch_size=settings.model.patch_size,
        design=design,
        batch_size=settings.train.batch_size,
        receipts=receipts,
        losses=(steps, record.smooth(means)),
        times=_read_times(records, settings.train.batch_size),
        passes=build.train_passes(settings),
    )


def _read_times(records, batch_size):
    """(steps, seconds of training until then) of a record; None if it has no speed."""
    speeds = [each.get("images_per_second") for each in records]
    if not all(isinstance(speed, int | float) and speed > 0 for speed in speeds):
        return None
    steps = [0, *(each["step"] for each in records)]
    seconds = np.cumsum([0, *(np.diff(steps) * batch_size / speeds)])
    return steps, seconds.tolist()


def _draw_sizes(out, runs, found):
    """Draws the figures of models of several sizes; returns their trend, or None."""
    if len(runs) < 2:
        return None
    plots.model_compute(out / "model_compute.png", runs, step=found.step, score=found.score)
    plots.training_compute(out / "training_compute.png", runs, score=found.score)
    plots.training(out / "training.png", runs, score=found.score)
    plots.losses(out / "losses.png", {run.model: run.losses for run in runs})
    scores = [scaling.value(run.receipt_at(found.step), found.score) for run in runs]
    return scaling.trend([run.gflops for run in runs], scores)


def _compare_designs(out, runs, found, reference):
    """Draws the designs of one model; returns the rows of their race to the reference's score."""
    name = runs[0].model.replace("/", "-")
    plots.designs(out / f"designs_{name}.png", runs, score=found.score)
    if all(run.times for run in runs):
        plots.designs(out / f"time_{name}.png", runs, score=found.score, over_time=True)
    same = [run for run in runs if run.design == reference]
    return scaling.races(runs, found.step, found.score, same[0]) if same else []


def _say_races(races, found):
    """The lines of the races of each model."""
    lines = []
    for rows in filter(None, races):
        first = rows[0]
        goal = f"until the score is {first['target']:.4g}, that of {first['reference']}"
        lines += [f"{first['model']}, {goal} at step {found.step}:", scaling.race_table(rows)]
    if lines and len(found.machines) > 1:
        lines.append(f"times do not compare: trained on {', '.join(found.machines)}")
    return lines


def _remarks(trend, found):
    """What is said below the tables."""
    lines, shown = [], found.shown
    default = [each for each in found.settings if design(each, shown) == DEFAULT]
    if default:
        lines.append(f"{DEFAULT}: {_name(default[0], shown)}")
    if trend:
        lines.append(f"correlation of log Gflops and score: {trend.correlation:.2f}")
        if trend.exponent is not None:
            lines.append(f"score ~ Gflops^{trend.exponent:.2f}")
        lines.append(f"({PAPER})")
    unequal = [n for n in varied(found.settings) if n not in compared(found.settings)]
    if unequal:
        lines.append(f"not comparable: the runs differ in {', '.join(unequal)}")
    if found.unscored:
        lines.append(f"without scores, left out: {', '.join(found.unscored)}")
    return lines
