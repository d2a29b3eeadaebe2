"""A cache of latents: the moments of every image and of its flip, in shards of ArrayRecord.

A directory holds the shards and manifest.json: the architecture and the digests of the autoencoder,
the crop, the type of the numbers, the classes, and the sha256 of every shard. Record i belongs to
example i of the dataset that was encoded; it is a little-endian int32 label and the moments.
Shapes: H W latent grid, C channels. Moments (2, H, W, 2C): of the image and of its flip, mean and
log variance in units of the VAE.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from array_record.python import array_record_data_source

from dit_jax.data import shards
from dit_jax.errors import UserError
from dit_jax.machine import disk

DTYPES = ("float16", "float32")


class Latents(NamedTuple):
    """Example i: {"moments": float32 (2, H, W, 2C), "label": int32}."""

    path: Path
    records: Any  # sequence of bytes
    split: str  # of the dataset that was encoded
    shape: tuple[int, int, int, int]
    dtype: str
    num_classes: int
    vae: dict  # the fields of a VAEConfig

    def __len__(self):
        return len(self.records)

    def __getitem__(self, index):
        record = shards.read_record(self.records, int(index), self.path)
        return parse(record, self.shape, self.dtype)


def parse(record, shape, dtype):
    moments = np.frombuffer(record, np.dtype(dtype).newbyteorder("<"), offset=4).reshape(shape)
    label = np.frombuffer(record[:4], "<i4")[0]
    return {"moments": moments.astype(np.float32), "label": np.int32(label)}


def pick_at_random(example, rng):
    """The moments (H, W, 2C) of the image or of its flip, one as likely as the other."""
    return example | {"moments": example["moments"][int(rng.random() < 0.5)]}


def pick_first(example, rng):
    """The moments (H, W, 2C) of the image itself."""
    return example | {"moments": example["moments"][0]}


def open_latents(path):
    """The Latents of a finished directory of dit-encode."""
    path = Path(path)
    manifest = read_manifest(path)
    if manifest is None:
        raise UserError(f"data.path must be a finished directory of dit-encode, got {path}")
    shards.check_files(path, manifest["shards"])
    files = [str(path / name) for name in manifest["shards"]]
    return Latents(
        path,
        array_record_data_source.ArrayRecordDataSource(files),
        manifest["split"],
        tuple(manifest["shape"]),
        manifest["dtype"],
        manifest["num_classes"],
        manifest["vae"],
    )


def read_manifest(path):
    """The manifest of a finished directory, None of another one."""
    manifest = disk.read_json(Path(path) / "manifest.json")
    return manifest if "vae" in manifest else None


def shard_ranges(num_examples, per_shard):
    """{name of a shard: range of its examples}."""
    count = -(-num_examples // per_shard)
    edges = [i * per_shard for i in range(count)] + [num_examples]
    return {
        f"latents.array_record-{i:05d}-of-{count:05d}": range(edges[i], edges[i + 1])
        for i in range(count)
    }


def claim(out, plan):
    """Makes a directory that of a plan, a JSON dict; UserError where it is that of another one."""
    notes = Path(out) / shards.PROGRESS
    path = notes / "plan.json"
    finished = read_manifest(out)
    known = finished or disk.read_json(path)
    if not known:
        strange = sorted(place.name for place in Path(out).iterdir() if place.name[0] != ".")
        if strange:
            raise UserError(f"OUT must be new, empty or of dit-encode, got {out}: {strange[0]}")
        notes.mkdir(exist_ok=True)
        disk.write_text(path, json.dumps(plan))
    else:
        check_plan(out, known, plan)
        notes.mkdir(exist_ok=True)


def check_plan(out, known, plan):
    """UserError where what is known of a directory is of another plan."""
    for name, value in plan.items():
        if known.get(name) != value:
            raise UserError(
                f"{name} must be that of {out}: what is there was encoded with "
                f"{_short(known.get(name))}, got {_short(value)}"
            )


def _short(value):
    text = json.dumps(value)
    return text if len(text) < 60 else hashlib.sha256(text.encode()).hexdigest()[:16]


def find_written(out):
    """{name: {"examples", "file_bytes", "sha256"}} of the shards that are there."""
    out = Path(out)
    notes = (out / shards.PROGRESS).glob("latents.*.json")
    known = (read_manifest(out) or {}).get("shards", {})
    known |= {path.name.removesuffix(".json"): disk.read_json(path) for path in notes}
    return {name: shard for name, shard in known.items() if shards.is_whole(out / name, shard)}


def write_shard(out, name, examples, dtype):
    """Writes (label, moments (2, H, W, 2C)) as a shard, whole or not at all, and notes it."""
    out = Path(out)
    aside = out / f".partial-{os.getpid()}-{name}"
    number, count = np.dtype(dtype).newbyteorder("<"), 0
    with shards.open_writer(aside) as writer:
        for label, moments in examples:
            record = np.int32(label).astype("<i4").tobytes()
            writer.write(record + moments.astype(number).tobytes())
            count += 1
    known = {"examples": count, **shards.seal(aside, out / name)}
    disk.write_text(out / shards.PROGRESS / f"{name}.json", json.dumps(known))


def finish(out, plan, names):
    """Writes the manifest, once every shard is there."""
    out = Path(out)
    written = find_written(out)
    manifest = plan | {"shards": {name: written[name] for name in names}}
    disk.write_text(out / "manifest.json", json.dumps(manifest, indent=1) + "\n")
    shards.remove_notes(out)
