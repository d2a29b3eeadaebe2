"""Reads the offline files of Weights & Biases: records of its own protobuf in LevelDB's log format.

A file has a header of 7 bytes and blocks of 32,768 bytes. A record has the pieces FULL, or FIRST,
MIDDLE and LAST, each with a header of checksum, length and kind. A block's end that is too short
for a header is padding.
"""

import json
import struct

from wandb.proto import wandb_internal_pb2

BLOCK, HEADER = 32768, 7
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def read(folder):
    """The records of all runs in the folder wandb of a workdir, in their order."""
    paths = sorted(folder.glob("offline-run-*/*.wandb"), key=lambda path: path.stat().st_ctime_ns)
    return [record for path in paths for record in _read_file(path)]


def _read_file(path):
    data = path.read_bytes()
    assert data[:4] == b":W&B"
    place, pieces = HEADER, b""
    while place + HEADER <= len(data):
        if BLOCK - place % BLOCK < HEADER:
            place += BLOCK - place % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + HEADER])
        piece = data[place + HEADER : place + HEADER + length]
        pieces = piece if kind in (FULL, FIRST) else pieces + piece
        place += HEADER + length
        if kind in (FULL, LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(pieces)
            yield record


def history(folder):
    """[{name: value}] of the rows that were logged, without what wandb adds but the _step."""
    rows = []
    for record in read(folder):
        if record.WhichOneof("record_type") == "history":
            items = {
                item.key or ".".join(item.nested_key): json.loads(item.value_json)
                for item in record.history.item
            }
            kept = {k: v for k, v in items.items() if not k.startswith("_") or k == "_step"}
            rows.append({"_step": record.history.step.num} | kept)
    return rows


def configs(folder):
    """[{topic: fields}] of the settings that each run was started with."""
    runs = [each.run for each in read(folder) if each.WhichOneof("record_type") == "run"]
    return [{x.key: json.loads(x.value_json) for x in run.config.update} for run in runs]
