"""What the files of a run tell: its settings, record, scores, history, state and cost.

It only reads, also while the run is being written, and it starts no device.
"""

import datetime
import functools
from typing import Any, NamedTuple

from dit_jax import settings as settings_lib
from dit_jax.checkpoint import peek, steps
from dit_jax.convert import receipts
from dit_jax.diffusion import fields as diffusion_fields
from dit_jax.errors import UserError
from dit_jax.evals import scaling
from dit_jax.machine import disk
from dit_jax.runs import history, own_config, record
from dit_jax.runs import workdir as workdirs

NEVER = "no step was logged yet"


class Score(NamedTuple):
    """A score of a run, for example the best one."""

    name: str
    value: float
    step: int

    def __str__(self):
        return f"{self.name}: {self.value:.4g} at step {self.step:,}"


class Cost(NamedTuple):
    """What a run cost.

    flops: model FLOPs of all computed steps, lost and skipped ones too. hours: of the steps in the
    record; compiling, saving, sampling and lost steps are not in it. device_hours: None if a part
    of the record has no number of devices. repeated: lost and skipped steps.
    """

    flops: float
    hours: float
    device_hours: float | None
    repeated: int


class Summary(NamedTuple):
    """What the files of a run tell.

    settings: None if config.json is damaged. receipts: [(path below the run, receipt)] by step.
    saved: the steps in checkpoints. meta: what the newest of them says of itself, {} if there is
    none. aside: [(name, time or None)] of the steps in damaged/. problems: files that could not be
    read, as text.
    """

    name: str
    path: Any
    settings: settings_lib.Settings | None
    records: list
    events: list
    receipts: list
    judgments: dict
    origin: dict
    saved: list
    meta: dict
    aside: list
    is_locked: bool
    problems: list

    @property
    def step(self):
        """The last logged step, else the last saved one."""
        return self.records[-1]["step"] if self.records else max(self.saved, default=0)

    @property
    def model(self):
        """Size, patch, and the design if it is not adaLN-Zero; "?" without settings."""
        if not self.settings:
            return "?"
        model = self.settings.model
        design = "" if model.conditioning == "adaln_zero" else f" {model.conditioning}"
        return f"{model.name}{design}"

    @property
    def data(self):
        """The name of the data."""
        if not self.settings:
            return "?"
        data = self.settings.data
        return data.path.rstrip("/").rpartition("/")[2] or data.source

    @property
    def state(self):
        """Whether it runs, or how it ended."""
        last = self.events[-1] if self.events else {"event": None}
        if last["event"] in history.ENDS:
            is_short = last["event"] == "finished"
            return "finished" if is_short else f"{last['event']} at step {last['step']:,}"
        if self.is_locked:
            return "running" if self.records else "starting"
        if not self.records and not self.saved:
            return NEVER
        if last["event"] and not disk.is_on_disk(self.path):  # a bucket has no locks
            return f"running, or killed after step {self.step:,}"
        if last["event"]:
            return f"killed after step {self.step:,}"
        total = self.settings.run.total_steps if self.settings else None
        is_done = total is not None and max(self.saved, default=0) >= total
        return "finished" if is_done else f"stopped at step {self.step:,}"

    @property
    def loss(self):
        """The last smoothed loss, None before the first log; of a mean flow the mse."""
        name = diffusion_fields.watched(self.settings.diffusion) if self.settings else "loss"
        _, losses = record.curve(self.records, name)
        return record.smooth(losses)[-1] if losses else None

    @property
    def best(self):
        """The best Score: of the first score in receipts, else of the record, else None."""
        found = [(name, receipt) for _, receipt in self.receipts for name in receipt["scores"]]
        if found:
            name = found[0][0]
            points = [
                Score(name, receipt["scores"][name]["value"], receipt["samples"].get("step") or 0)
                for each, receipt in found
                if each == name
            ]
        else:
            name = record.SCORES["frechet_distance"]
            scored = [each for each in self.records if "frechet_distance" in each]
            points = [Score(name, each["frechet_distance"], each["step"]) for each in scored]
        if not points and "agreement" in self.judgments.get("judgments", {}):
            agreement = self.judgments["judgments"]["agreement"]
            return Score("agreement with the label", agreement, self.judgments["step"])
        choose = min if scaling.lower_is_better(name) else max
        return choose(points, key=lambda score: score.value, default=None)

    @property
    def cost(self):
        """The Cost, None before the first log."""
        seconds, flops, device_seconds, before = 0.0, 0.0, 0.0, 0
        if not self.records or not self.settings:
            return None
        batch_size = self.settings.train.batch_size
        for each in self.records:
            count = each["step"] - before
            spent = count * batch_size / each["images_per_second"]
            seconds += spent
            flops += each["model_tflops_per_second"] * 1e12 * spent
            devices = self._num_devices(before)
            known = devices is not None and device_seconds is not None
            device_seconds = device_seconds + spent * devices if known else None
            before = each["step"]
        repeated = sum(each.get("lost", 0) for each in self.events)
        repeated += sum(bad - good for bad, good in self.rollbacks)
        flops *= 1 + repeated / before
        device_hours = None if device_seconds is None else device_seconds / 3600
        return Cost(flops, seconds / 3600, device_hours, repeated)

    @property
    def rollbacks(self):
        """[(step where it diverged, step that it went back to)] in history.jsonl."""
        rolled = [each for each in self.events if each["event"] == "rolled back"]
        return [(each["step"], each["to"]) for each in rolled]

    def _num_devices(self, step):
        """How many devices computed the steps after one, None if that was not recorded."""
        starts = [each for each in self.events if "num_devices" in each and each["step"] <= step]
        return starts[-1]["num_devices"] if starts else None


def is_run(path):
    """Whether a folder has the config or the record of a run of dit-train."""
    if disk.exists(path / "metrics.jsonl"):
        return True
    try:
        return {"model", "run"} <= disk.read_json(path / "config.json").keys()
    except UserError:  # damaged: of a run, if it has saved steps
        return disk.exists(path / "checkpoints")


def check(path):
    """UserError unless a folder has a run."""
    if not is_run(path):
        raise UserError(f"WORKDIR must be a run of dit-train, got {path}")


def read(path, name=None):
    """The Summary of the run in a workdir; UserError if there is none."""
    path = disk.path(path)
    check(path)
    problems = []
    read_file = functools.partial(_try, problems)
    saved = read_file(lambda: steps.saved(path / "checkpoints"), [])
    return Summary(
        name=name or disk.absolute(path).name,
        path=path,
        settings=read_file(lambda: own_config.read_settings(path), None),
        records=read_file(lambda: _check(record.read(path / "metrics.jsonl"), path), []),
        events=history.read(path),
        receipts=_read_receipts(path, read_file),
        judgments=read_file(lambda: _read_judgments(path / "judgments.json"), {}),
        origin=read_file(lambda: disk.read_json(path / workdirs.ORIGIN), {}),
        saved=saved,
        meta=read_file(lambda: _read_meta(path, saved), {}),
        aside=[(each.name, _changed(each)) for each in disk.children(path / "damaged")],
        is_locked=disk.is_on_disk(path) and disk.is_locked(path),
        problems=problems,
    )


def _try(problems, read, absent):
    """read(), or `absent` with a line in problems if a file is damaged."""
    try:
        return read()
    except (UserError, OSError) as error:
        problems.append(str(error))
        return absent


def _read_meta(path, saved):
    """What the newest saved step says of itself; {} if there is none, or if it was just deleted."""
    return disk.read_json(path / "checkpoints" / str(saved[-1]) / peek.FILE) if saved else {}


def _check(records, path):
    """The records; UserError if one lacks what every log writes."""
    names = ("loss", "images_per_second", "model_tflops_per_second")
    for each in records:
        for name in names:
            if not isinstance(each.get(name), int | float):
                raise UserError(
                    f"{path / 'metrics.jsonl'} must have the {name} of step {each['step']}: "
                    "the curves are left out"
                )
    return records


def _read_receipts(path, read_file):
    """[(path below the run, receipt)] of the receipts that can be read, by step."""
    found = sorted([*path.glob("*/receipt.json"), *path.glob("*/*/receipt.json")])
    kept = [
        (str(file.relative_to(path)), read_file(lambda f=file: _read_receipt(f), None))
        for file in found
    ]
    kept = [each for each in kept if each[1]]
    return sorted(kept, key=lambda each: (each[1]["samples"].get("step") or 0, each[0]))


def _read_receipt(file):
    """The receipt in a file; UserError if it lacks samples or scores with values."""
    receipt = disk.read_json(file)
    try:
        receipt["samples"].get("step")
        sum(score["value"] for score in receipt["scores"].values())
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} must have samples and scores with values, got others") from error
    return receipt


def _read_judgments(file):
    """The content of judgments.json, {} if there is none; UserError if it lacks judgments."""
    found = disk.read_json(file)
    if found:
        try:
            sum((x.value for x in receipts.Receipt(file, found).scores), found["step"])
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{file} must have judgments of a step, got others") from error
    return found


def _changed(path):
    """When a folder on a disk was last moved or changed, in UTC; None in a bucket."""
    if not disk.is_on_disk(path):
        return None
    changed = datetime.datetime.fromtimestamp(path.stat().st_ctime, datetime.UTC)
    return changed.isoformat(timespec="seconds")
