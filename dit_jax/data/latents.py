"""A cache of latents: the moments of every image and of its mirror image, in shards.

A directory holds ArrayRecord shards and manifest.json: the architecture and the digests of the
autoencoder, the crop size, the dtype, the classes and the sha256 of every shard. Record i is
example i of the encoded dataset: a little-endian int32 label, then the moments.

Shapes: H W latent grid, C latent channels. `moments` (2, H, W, 2C): mean and log variance of the
image and of its mirror image, in VAE units.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from array_record.python import array_record_data_source

from dit_jax.data import arrayrecord
from dit_jax.errors import UserError
from dit_jax.machine import disk

DTYPES = ("float16", "float32")


class Latents(NamedTuple):
    """Example i: {"moments": float32 (2, H, W, 2C) in VAE units, "label": int32}."""

    path: Path
    records: Any  # sequence of bytes
    split: str  # the encoded split of the dataset
    shape: tuple[int, int, int, int]  # of the moments: (2, H, W, 2C)
    dtype: str  # of the moments on disk
    num_classes: int
    vae: dict  # the fields of a VAEConfig
    sha256: str  # of the content, from the digests of the shards
    class_names: tuple[str, ...]  # the name of label i; () in a cache that an older version wrote

    def __len__(self):
        return len(self.records)

    def __getitem__(self, index):
        record = arrayrecord.read_record(self.records, int(index), self.path)
        return parse(record, self.shape, self.dtype)


def parse(record, shape, dtype):
    """The example in the bytes of a record."""
    label = np.frombuffer(record[:4], "<i4")[0]
    moments = np.frombuffer(record, np.dtype(dtype).newbyteorder("<"), offset=4).reshape(shape)
    return {"moments": moments.astype(np.float32), "label": np.int32(label)}


def pick_at_random(example, rng):
    """Keeps the moments (H, W, 2C) of the image or of its mirror image, with equal probability."""
    return example | {"moments": example["moments"][int(rng.random() < 0.5)]}


def pick_first(example, rng):
    """Keeps the moments (H, W, 2C) of the image itself."""
    return example | {"moments": example["moments"][0]}


def open_latents(path):
    """The Latents of a directory; UserError if dit-encode has not finished it."""
    path = Path(path)
    manifest = read_manifest(path)
    if manifest is None:
        raise UserError(f"data.path must be a finished directory of dit-encode, got {path}")
    arrayrecord.check_files(path, manifest["shards"])
    files = [str(path / name) for name in manifest["shards"]]
    return Latents(
        path,
        array_record_data_source.ArrayRecordDataSource(files),
        manifest["split"],
        tuple(manifest["shape"]),
        manifest["dtype"],
        manifest["num_classes"],
        manifest["vae"],
        content_sha256(manifest),
        tuple(manifest.get("class_names", ())),
    )


def read_manifest(path):
    """The manifest of a finished cache, else None."""
    manifest = disk.read_json(disk.path(path) / "manifest.json")
    return manifest if "vae" in manifest else None


def finished(out):
    """The manifest of a finished cache; UserError if there is none."""
    manifest = read_manifest(out)
    if manifest is None:
        raise UserError(f"OUT must be a finished directory of dit-encode, got {out}")
    return manifest


def content_sha256(manifest):
    """A hex digest of all that a manifest's cache gives to a training run."""
    how = {name: manifest[name] for name in ("dtype", "shape", "vae")}
    return arrayrecord.content_sha256(manifest["shards"], how)


def shard_ranges(num_examples, examples_per_shard):
    """{shard name: range of the indices of its examples}."""
    num_shards = -(-num_examples // examples_per_shard)
    edges = [i * examples_per_shard for i in range(num_shards)] + [num_examples]
    return {
        f"latents.array_record-{i:05d}-of-{num_shards:05d}": range(edges[i], edges[i + 1])
        for i in range(num_shards)
    }


def claim(out, plan):
    """Starts or resumes a cache; UserError if the directory holds anything else.

    plan: the settings on which the content depends, a dict of JSON values.
    """
    check_out(out, plan)
    notes = Path(out) / arrayrecord.PROGRESS
    notes.mkdir(exist_ok=True)
    if not read_manifest(out):
        disk.write_text(notes / "plan.json", json.dumps(plan))


def check_out(out, plan):
    """UserError if a directory holds anything but a cache of this plan, or of a part of a plan."""
    notes = Path(out) / arrayrecord.PROGRESS
    existing = read_manifest(out) or disk.read_json(notes / "plan.json")
    files = [x.name for x in disk.children(Path(out)) if not disk.is_clutter(x.name)]
    if existing and files:  # without a shard, another plan may replace it: nothing is lost
        check_plan(out, existing, plan)
        return
    if files:
        raise UserError(
            f"OUT must be new, empty or written by dit-encode, got {out} with {files[0]}"
        )


def check_plan(out, existing, plan):
    """UserError if the existing plan or manifest of a cache differs from this plan."""
    for name, value in plan.items():
        if existing.get(name) != value:
            old, new = _shorten(existing.get(name)), _shorten(value)
            raise UserError(f"{name} must be {old}, as in {out}, got {new}")


def _shorten(value):
    text = json.dumps(value)
    return text if len(text) < 60 else hashlib.sha256(text.encode()).hexdigest()[:16]


def find_written(out):
    """{name: entry} of the finished shards, see `arrayrecord`."""
    out = Path(out)
    entries = (read_manifest(out) or {}).get("shards", {})
    for note in (out / arrayrecord.PROGRESS).glob("latents.*.json"):
        entries[note.name.removesuffix(".json")] = disk.read_json(note)
    return {name: x for name, x in entries.items() if arrayrecord.is_whole(out / name, x)}


def write_shard(out, name, examples, dtype):
    """Writes a shard atomically from (label, moments (2, H, W, 2C)) and notes its entry."""
    path = Path(out) / name
    partial = arrayrecord.partial_path(path)
    number, count = np.dtype(dtype).newbyteorder("<"), 0
    with arrayrecord.open_writer(partial) as writer:
        for label, moments in examples:
            record = np.int32(label).astype("<i4").tobytes()
            writer.write(record + moments.astype(number).tobytes())
            count += 1
    entry = {"examples": count, **arrayrecord.seal(partial, path)}
    disk.write_text(path.parent / arrayrecord.PROGRESS / f"{name}.json", json.dumps(entry))


def finish(out, plan, names, class_names):
    """Writes the manifest. Every shard must have been written.

    The names of the classes are no part of the plan, since older caches lack them.
    """
    out = Path(out)
    written = find_written(out)
    manifest = plan | {"class_names": list(class_names)}
    manifest |= {"shards": {name: written[name] for name in names}}
    disk.write_text(out / "manifest.json", json.dumps(manifest, indent=1) + "\n")
    arrayrecord.remove_notes(out)
