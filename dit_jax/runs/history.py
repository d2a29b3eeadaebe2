"""The history of a run: history.jsonl, one line for each start, resume, rollback and end.

A line has the event, its step, and the time in UTC. Runs of older versions have no such file.
"""

import datetime
import json

from dit_jax.machine import disk
from dit_jax.runs import record

FILE = "history.jsonl"
STARTS = ("started", "resumed")
ENDS = ("finished", "stopped", "diverged", "failed")


def start(workdir, step):
    """Adds the start or the resume of a run at a step, before its record is cut off there.

    lost: the steps beyond, which an interrupted process had logged and this one repeats.
    """
    import jax  # here: commands read a history without it

    from dit_jax.machine import devices

    if jax.process_index() != 0:
        return
    records = record.read(workdir / "metrics.jsonl")
    lost = max(0, records[-1]["step"] - step) if records else 0
    machine = {"devices": devices.describe(), "num_devices": jax.device_count()}
    add(workdir, "resumed" if step else "started", step, lost=lost, **machine)


def add(workdir, event, step, **more):
    """Adds an event, on process 0; a file that cannot be written is only warned of.

    more: JSON. `to` is the step that a rollback goes back to, `reason` a text.
    """
    import jax

    if jax.process_index() != 0:
        return
    path = workdir / FILE
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    line = json.dumps({"time": now, "event": event, "step": step, **more})
    with disk.only_warned(f"{path} could not be written"):
        before = _read_text(path)
        separator = "\n" if before and not before.endswith("\n") else ""  # a line was cut off
        disk.write_text(path, f"{before}{separator}{line}\n")


def read(workdir):
    """The events, oldest first; lines that are no events are left out."""
    events = map(_parse, _read_text(workdir / FILE).splitlines())
    return [event for event in events if event]


def _parse(line):
    """The event of a line, None if it is none."""
    try:
        event = json.loads(line)
        steps = [event["step"], event["to"]] if event["event"] == "rolled back" else [event["step"]]
        return event if event["time"] and all(isinstance(step, int) for step in steps) else None
    except (ValueError, TypeError, KeyError):
        return None


def _read_text(path):
    return path.read_bytes().decode(errors="replace") if disk.exists(path) else ""


def describe(event):
    """An event as a sentence without its time."""
    step, name = f"step {event['step']:,}", event["event"]
    if name in STARTS:
        where = f" on {event['devices']}" if "devices" in event else ""
        lost = event.get("lost")
        again = f"; {lost:,} steps after it had been lost and were repeated" if lost else ""
        return f"{name} {'from' if name == 'resumed' else 'at'} {step}{where}{again}"
    reason = f": {event['reason']}" if event.get("reason") else ""
    if name == "rolled back":
        skipped = f"skipping {event['step'] - event['to']:,} batches"
        return f"diverged at {step} and went back to step {event['to']:,}, {skipped}{reason}"
    text = {
        "finished": f"finished at {step}",
        "stopped": f"stopped on request at {step}",
        "diverged": f"diverged at {step} and ended",
        "failed": f"ended at {step}, whose save failed",
    }.get(name, f"{name} at {step}")
    return text + reason
