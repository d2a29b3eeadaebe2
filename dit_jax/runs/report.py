"""The report of one run or of several: one HTML file that explains them (`dit-report`)."""

import datetime
import functools
import json
from html import escape

import jax
from absl import logging

from dit_jax import settings as settings_lib
from dit_jax.convert import receipts
from dit_jax.machine import disk, prng, words
from dit_jax.models import dit
from dit_jax.runs import charts, gallery, history, page, summary
from dit_jax.sampling import fields

FILE = "report.html"
COST = (
    "FLOPs are those of the loss and its gradient: matrix products, without what rematerialisation "
    "repeats; lost and skipped steps count too. Times are of the steps in the record, without "
    "compiling, saving and sampling."
)


def refresh(workdir):
    """Writes the report of a run that trains, from process 0; a failure is only warned of.

    Not in a bucket, where reading all samples again would take seconds.
    """
    if jax.process_index() != 0 or not disk.is_on_disk(workdir):
        return
    try:
        write([workdir], workdir / FILE)
    except Exception as error:  # whatever is wrong with it, no report is worth a run
        logging.warning("%s could not be written: %s", workdir / FILE, error)


def write(workdirs, out):
    """Writes the report of the runs in workdirs to the file `out`; returns its Summaries.

    UserError if one is no run.
    """
    paths = list(dict.fromkeys(map(disk.absolute, workdirs)))  # each once
    runs = list(map(summary.read, paths, words.ends(paths)))
    limit = max(2, gallery.MAX_PICTURES // len(runs))
    shown, problems = zip(*(gallery.pictures(path, limit) for path in paths), strict=True)
    runs = [
        run._replace(problems=run.problems + more) for run, more in zip(runs, problems, strict=True)
    ]
    disk.write_text(out, render(runs, shown))
    return runs


def render(runs, shown):
    """The HTML of a report of Summaries; shown: of `gallery.pictures`, for each run."""
    figures = charts.make(runs)
    title = ", ".join(run.name for run in runs)
    now = datetime.datetime.now(datetime.UTC)
    kind = "A training run" if len(runs) == 1 else f"{len(runs)} training runs"
    body = [
        f"<h1>{escape(title)}</h1>",
        page.paragraph(f"{kind} of dit_jax, as of {now:%Y-%m-%d %H:%M} UTC", "small"),
        *(page.paragraph(text, "problem") for run in runs for text in _problems(run, len(runs))),
        _overview(runs),
        *([_differences(runs)] if len(runs) > 1 else []),
        page.section("Samples of the EMA", _samples(runs, shown)),
        page.section("Curves", _curves(figures, runs)),
        page.section("Scores", _scores(runs)),
        _configuration(runs),
        page.section("History", *(_history(run, len(runs)) for run in runs)),
    ]
    return page.write(title, "\n".join(filter(None, body)), [figure for _, figure in figures])


def _problems(run, count):
    prefix = f"{run.name}: " if count > 1 else ""
    texts = [*run.problems]
    if not run.records and not texts:
        texts.append(f"{summary.NEVER}, so there are no curves yet")
    return [prefix + text for text in texts]


def _facts(run):
    """{what: value} of a run: what it is, how far it came, and what it cost."""
    total = f" of {run.settings.run.total_steps:,}" if run.settings else ""
    facts = {"model": f"DiT-{run.model}", "data": run.data}
    facts |= {"parameters": _count_parameters(run.settings and run.settings.model)}
    facts |= {"state": run.state, "step": f"{run.step:,}{total}"}
    facts |= {"loss, smoothed": run.loss}
    if cost := run.cost:
        facts["model FLOPs"] = _power(cost.flops)
        if cost.device_hours is None:
            facts["time of the steps"] = _time(cost.hours)
        else:
            facts["device time"] = _time(cost.device_hours)
    return facts


@functools.cache
def _count_parameters(model):
    """The number of parameters of settings.Model, None if they fit no model."""
    try:
        config = dit.configure(**vars(model))
    except (ValueError, TypeError):
        return None
    shapes = jax.eval_shape(lambda: dit.init(config, prng.key(0)))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def _power(value):
    """A large number as 1.23 · 10^15."""
    mantissa, exponent = f"{value:.2e}".split("e")
    return page.Html(f"{mantissa} · 10<sup>{int(exponent)}</sup>")


def _time(hours):
    if hours >= 1:
        return f"{hours:,.1f} h"
    return f"{60 * hours:.1f} min" if hours >= 1 / 60 else f"{3600 * hours:.0f} s"


def _marked(runs):
    """The names of the runs with their colours."""
    return [page.marked(charts.color(i), run.name) for i, run in enumerate(runs)]


def _overview(runs):
    facts = [_facts(run) for run in runs]
    costs = page.paragraph(COST, "small") if any(run.cost for run in runs) else ""
    if len(runs) == 1:
        if best := runs[0].best:
            facts[0][f"{best.name} at step {best.step:,}"] = best.value
        return page.tiles(facts[0]) + costs
    names = [*dict.fromkeys(name for each in facts for name in each), "best score"]
    facts = [each | {"best score": run.best} for each, run in zip(facts, runs, strict=True)]
    rows = [
        [name, *(page.Html(page.cell_text(each.get(name))) for each in facts)] for name in names
    ]
    return page.table(["", *_marked(runs)], rows) + costs


def _curves(figures, runs):
    if not figures:
        return ""
    text = "Pale: the mean since the last log. Strong: smoothed over a tenth of the run. "
    if len(runs) == 1 and figures[0][1]["layout"]["shapes"]:
        text += "Dotted: a resume or a rollback. "
    text += "Click a name to hide its curve; drag to zoom; double-click to see all again."
    plots = (
        f'<div class="chart"><h3>{escape(title)}</h3>{page.plot(i)}</div>'
        for i, (title, _) in enumerate(figures)
    )
    return page.paragraph(text, "small") + f'<div class="charts">{"".join(plots)}</div>'


def _scores(runs):
    """A table of the receipts of all runs, and of the judgments of digits."""
    found = [(run, path, each) for run in runs for path, each in run.receipts]
    names = list(dict.fromkeys(name for _, _, each in found for name in each["scores"]))
    rows = []
    for run, path, receipt in found:
        file = page.Html(escape(path).replace("/", "/<wbr>"))  # where a line may break
        rows.append([*_origin(run, receipt), *(_score(receipt, name) for name in names), file])
        if held_out := receipt.get("held_out"):
            floors = (page.Html(page.cell_text(held_out.get(name))) for name in names)
            rows.append([run.name, None, "held-out images", None, *floors, file])
    header = ["run", "step", "samples", "sampling", *names, "receipt"]
    if len(runs) == 1:
        header, rows = header[1:], [row[1:] for row in rows]
    judged = [_judgments(run, len(runs)) for run in runs if run.judgments]
    return "\n".join([page.table(header, rows), *judged])


def _origin(run, receipt):
    """Run, step, number and sampling of the samples of a receipt, as text."""
    samples = receipt["samples"]
    options = samples.get("sampling") or {}
    parts = [options.get("sampler"), options.get("num_steps")]
    if "cfg_scale" in options:
        parts.append(f"guidance {options['cfg_scale']:g}")
    counts = (page.Html(page.cell_text(samples.get(name))) for name in ("step", "count"))
    return run.name, *counts, " ".join(filter(None, parts))


def _score(receipt, name):
    """A score with its deviation as text; its spaces do not break."""
    score = receipt["scores"].get(name)
    if not score:
        return None
    deviation = score.get("deviation")
    more = "" if deviation is None else f"\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}{deviation:.2g}"
    return f"{score['value']:.4g}{more}"


def _judgments(run, count):
    """A table of the judgments of digits of a run."""
    scores = receipts.Receipt("judgments.json", run.judgments).scores
    rows = [[score.name, score.value, score.real] for score in scores]
    prefix = f"{run.name}, " if count > 1 else ""
    title = f"{prefix}step {run.judgments['step']:,}, by judgments.json"
    header = ["score", "samples", "real digits"]
    return page.paragraph(title, "small") + page.table(header, rows)


def _samples(runs, shown):
    """The samples of the runs, with a slider over their steps."""
    known = sorted({step for each in shown for step, _, _ in each})
    if not known:
        return ""
    figures = []
    for mark, run, each in zip(_marked(runs), runs, shown, strict=True):
        if not each:
            continue
        images = (
            f'<img src="{uri}" data-step="{step}" alt="samples of step {step}" '
            f'width="{size[0]}" height="{size[1]}"{"" if step == each[-1][0] else " hidden"}>'
            for step, uri, size in each
        )
        title = f"<h3>{mark}</h3>" if len(runs) > 1 else ""
        classes = page.paragraph(_classes(run), "small")
        figures.append(f"<figure>{title}{''.join(images)}{classes}</figure>")
    last = len(known) - 1
    slider = (
        f'<div class="slider"><input type="range" id="slider" min="0" max="{last}" value="{last}" '
        f'aria-label="step of the samples" data-steps="{json.dumps(known)}">'
        f'<output id="step" for="slider">step {known[-1]:,}</output></div>'
    )
    return f'{slider}<div class="samples">{"".join(figures)}</div>'


def _classes(run):
    """Which classes the samples of a run are of, by name if it knows them."""
    if not run.settings:
        return ""
    count = min(run.settings.run.num_samples, run.settings.model.num_classes)
    names = fields.class_names(run.meta) or [str(label) for label in range(count)]
    more = f", ... ({words.count(count, 'class', 'classes')})" if count > 20 else ""
    return f"Always the same noise. Classes, in turn: {', '.join(names[: min(count, 20)])}{more}"


def _flat(settings):
    """{TOPIC.FIELD: value as text} of Settings."""
    return {name: _plain(value) for name, value in settings_lib.flat(settings).items()}


def _plain(value):
    """The value of a field as text: words without quotes, an empty one with them."""
    return value if value and isinstance(value, str) else json.dumps(value)


def _differences(runs):
    """A table of the fields in which the runs differ."""
    flats = [_flat(run.settings) if run.settings else {} for run in runs]
    names = [name for name in settings_lib.defaults() if len({f.get(name) for f in flats}) > 1]
    rows = [[name, *(flat.get(name) for flat in flats)] for name in names]
    text = "" if rows else page.paragraph("The runs have the same configuration.")
    return page.section("How the runs differ", page.table(["field", *_marked(runs)], rows), text)


def _configuration(runs):
    """How each run differs from the defaults of configs/base.py, and all its fields."""
    base, parts = _flat(settings_lib.Settings()), []
    for run in runs:
        if not run.settings:
            continue
        flat = _flat(run.settings)
        rows = [[name, flat[name], base[name]] for name in flat if flat[name] != base[name]]
        same = [[name, flat[name]] for name in flat if flat[name] == base[name]]
        title = f"{run.name}: " if len(runs) > 1 else ""
        changed = page.table(["field", "value", "configs/base.py"], rows)
        unchanged = f"{words.count(len(same), 'field')} as in configs/base.py"
        text = changed + page.folded(unchanged, page.table(["field", "value"], same))
        how = f"{title}{words.count(len(rows), 'field')} that differ from configs/base.py"
        parts.append(text if len(runs) == 1 else page.folded(how, text))
    return page.section("Configuration", *parts)


def _history(run, count):
    """A table of what happened to a run."""
    rows = [[_clock(each["time"]), history.describe(each)] for each in run.events]
    if not run.events:
        rows += [
            [None, history.describe({"event": "rolled back", "step": bad, "to": good})]
            for bad, good in run.meta.get("rollbacks", [])
        ]
    for name, when in run.aside:
        text = f"step {name} was corrupt and was set aside in damaged/{name}"
        rows.append([when and _clock(when), text])
    rows.sort(key=lambda row: row[0] or "")
    lines = [f"Saved steps: {', '.join(f'{step:,}' for step in run.saved) or 'none'}."]
    if run.origin:
        start = f"step {run.origin.get('step', 0):,} of {run.origin.get('path')}"
        lines.insert(0, f"It started from {start}.")
    if run.cost and run.cost.repeated:
        lines.append(f"{run.cost.repeated:,} steps were lost or skipped.")
    if not run.events and run.records:
        lines.append("Starts and resumes were not recorded by the version that trained it.")
    title = f"<h3>{escape(run.name)}</h3>" if count > 1 else ""
    return title + page.table(["UTC", "event"], rows) + page.paragraph(" ".join(lines), "small")


def _clock(text):
    return text[:19].replace("T", " ")
