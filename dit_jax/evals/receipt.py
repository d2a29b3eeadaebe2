"""Receipts: the JSON file beside every score, with which anyone repeats and compares it."""

import hashlib
import json
import reprlib

from dit_jax.errors import UserError
from dit_jax.machine import disk

TOLERANCE = 1e-4  # of a score that is repeated on another kind of device, relative
TOPICS = ("samples", "network", "reference", "features", "scores", "arguments")
WIDTH = 24  # letters of a value that differs
SAME = ("samples", "network", "reference")  # comparable receipts agree in these


def digest(content):
    """A sha256 of JSON."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write(file, content):
    disk.write_text(file, json.dumps(content, indent=2) + "\n")


def read(path):
    """The receipt in a file, or in a folder that dit-evaluate wrote; UserError if it is none."""
    file = disk.path(path)
    file = file / "receipt.json" if file.is_dir() else file
    content = disk.read_json(file)
    if not content:
        raise UserError(f"a receipt must be a file that dit-evaluate wrote, got {path}")
    if missing := [topic for topic in TOPICS if topic not in content]:
        raise UserError(f"a receipt must have {missing[0]}, got {path} without it")
    for topic in TOPICS:
        if not isinstance(content[topic], dict):
            shown = reprlib.repr(content[topic])
            raise UserError(f"{topic} of a receipt must be an object, got {shown} in {path}")
    check_scores(content["scores"], path)
    return content


def check_scores(scores, path):
    """UserError unless the scores of the receipt at a path are {name: {"value": number, ...}}."""
    if not isinstance(scores, dict):
        raise UserError(
            f"scores of a receipt must be an object, got {reprlib.repr(scores)}: {path}"
        )
    for name, score in scores.items():
        numbers = [score.get("value"), score.get("deviation") or 0] if type(score) is dict else []
        if not numbers or not all(type(x) in (int, float) for x in numbers):
            shown = reprlib.repr(score)
            raise UserError(f"{name} of a receipt must have a number as value, got {shown}: {path}")


def compare(receipts):
    """Lines of text that show receipts, {name: receipt}, side by side, and what differs.

    First the scores, one column a receipt; then every setting that is not the same in all.
    """
    rows = [["", *receipts]]
    for name in _union(receipt["scores"] for receipt in receipts.values()):
        rows.append([name, *(_show(receipt["scores"].get(name)) for receipt in receipts.values())])
    settings = {name: _flatten(receipt) for name, receipt in receipts.items()}
    differing = []
    for field in _union(settings.values()):
        values = [str(flat.get(field, "-")) for flat in settings.values()]
        if len(set(values)) > 1:
            differing.append([field, *map(_shorten, values)])
    rows += [["", *[""] * len(receipts)], *differing] if differing else []
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(x.ljust(n) for x, n in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def _shorten(text):
    """The end of a long path, the start of another long text: paths differ at their ends."""
    if len(text) <= WIDTH:
        return text
    return f"...{text[3 - WIDTH :]}" if "/" in text else text[:WIDTH]


def _union(mappings):
    """The keys of all mappings, each once, in their order."""
    return list(dict.fromkeys(key for mapping in mappings for key in mapping))


def _show(score):
    if score is None:
        return "-"
    deviation = "" if score.get("deviation") is None else f" +- {score['deviation']:.2g}"
    return f"{score['value']:.5g}{deviation}"


def _flatten(receipt):
    """{topic.field: value} of what a score depends on."""
    flat = {"name": receipt.get("name")}
    for topic in (*SAME, "devices", "versions"):
        flat |= _leaves(receipt.get(topic), topic)
    return flat


def _leaves(value, name):
    if not isinstance(value, dict):
        return {name: value}
    return {k: x for key in value for k, x in _leaves(value[key], f"{name}.{key}").items()}


def check_repeated(old, new):
    """(lines of text, whether the second receipt repeats the first).

    Features are compared by their digests. If they differ, as on another kind of device, each score
    may differ by TOLERANCE.
    """
    same = sum(old["features"].get(name) == x for name, x in new["features"].items())
    lines = [f"features: {same} of {len(new['features'])} shards are the same, bit for bit"]
    limit = 0 if same == len(new["features"]) == len(old["features"]) else TOLERANCE
    repeated = old["scores"].keys() == new["scores"].keys()
    for name, score in old["scores"].items():
        again = new["scores"].get(name, {"value": float("nan")})["value"]
        difference = abs(again - score["value"]) / max(abs(score["value"]), 1e-12)
        good = difference <= limit
        repeated &= good
        verdict = "same" if good else f"DIFFERS by {difference:.2g}"
        lines.append(f"{name}: {score['value']:.6g}, again {again:.6g}: {verdict}")
    return "\n".join(lines), bool(repeated)
