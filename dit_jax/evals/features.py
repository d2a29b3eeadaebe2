"""Features of numbered images, kept on a disk in shards, so that a killed evaluation goes on.

A folder holds identity.json, which says whose features they are, and shards: 0000000.npz has the
images 0 .. SHARD - 1, and so on. A shard is written once, atomically. It has `index` (n,), `label`
(n,), -1 where there is none, the `identity`, and the arrays of a network (n, ...), all float32.
"""

import hashlib
import io
import json
import os
import time
import zipfile
from typing import NamedTuple

import jax
import numpy as np
from absl import logging
from tqdm import tqdm

from dit_jax import compat
from dit_jax.errors import UserError
from dit_jax.machine import cluster, disk

SHARD = 512  # images


class Store:
    """The features in a folder on a disk. identity: a JSON object that names images and network."""

    def __init__(self, folder, identity):
        self.folder = disk.path(folder)
        identity = json.loads(json.dumps(identity))  # as the file has it
        self.identity = _digest(identity)
        disk.make_folder(self.folder, "out")
        file = self.folder / "identity.json"
        known = disk.read_json(file)
        if known and _digest(known) != self.identity:
            raise UserError(
                f"out must be new or hold the same evaluation, got {self.folder}, whose features "
                f"differ in {', '.join(_differences(known, identity))}"
            )
        if not known:
            disk.write_text(file, json.dumps(identity, indent=2) + "\n")

    def missing(self, count):
        """[(start, stop)] of the shards that images 0 .. count - 1 still need.

        A damaged shard is set aside and counts as missing. UserError for one of other images or of
        another network.
        """
        ranges = [(start, min(start + SHARD, count)) for start in range(0, count, SHARD)]
        return [(start, stop) for start, stop in ranges if not self._has(start, stop)]

    def _has(self, start, stop):
        file = self._file(start)
        if not file.is_file():
            return False
        try:
            shard = _load(file)
            index = shard["index"]
            whole = np.array_equal(index, np.arange(start, start + len(index)))
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            whole, shard = False, error
        if not whole:
            aside = file.with_suffix(f".damaged-{os.getpid()}")
            file.rename(aside)
            logging.warning("%s is damaged and was moved to %s: it is made anew", file, aside.name)
            return False
        if str(shard["identity"]) != self.identity:
            raise UserError(
                f"shard {file} must be of the same images and network as {self.folder}, got one "
                "of others: delete it"
            )
        return len(index) >= stop - start

    def write(self, start, labels, features):
        """Writes the shards from image `start` on. labels (n,) or None; {name: (n, ...)}."""
        count = len(next(iter(features.values())))
        labels = np.full(count, -1) if labels is None else labels
        arrays = {"index": np.arange(start, start + count), "label": np.asarray(labels, np.int32)}
        arrays |= {name: np.asarray(x, np.float32) for name, x in features.items()}
        for first in range(0, count, SHARD):
            shard = {name: x[first : first + SHARD] for name, x in arrays.items()}
            opened = io.BytesIO()
            np.savez(opened, identity=np.array(self.identity), **shard)
            disk.write_bytes(self._file(start + first), opened.getvalue())

    def shards(self, count):
        """Yields {name: (n, ...)} of one shard after another, up to image count - 1."""
        for start in range(0, count, SHARD):
            shard = _load(self._file(start))
            yield {name: shard[name][: count - start] for name in shard if name != "identity"}

    def read(self, count):
        """{name: (count, ...)} of images 0 .. count - 1; all shards must be there."""
        shards = list(self.shards(count))
        return {name: np.concatenate([x[name] for x in shards]) for name in shards[0]}

    def digests(self, count):
        """{shard: sha256 of its labels and features}, whatever NumPy writes around them."""
        return {
            self._file(i * SHARD).name: _digest_of(shard)
            for i, shard in enumerate(self.shards(count))
        }

    def _file(self, start):
        return self.folder / f"{start:07d}.npz"


def _load(file):
    with file.open("rb") as opened, np.load(opened, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


def _digest_of(arrays):
    digest = hashlib.sha256()
    for name, x in sorted(arrays.items()):
        digest.update(f"{name} {x.dtype} {x.shape}".encode() + x.tobytes())
    return digest.hexdigest()


def _digest(identity):
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _differences(known, wanted, prefix=""):
    """The names of the fields that differ between two JSON objects, as samples.seed."""
    names = []
    for name in sorted(known.keys() | wanted.keys()):
        a, b = known.get(name), wanted.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            names += _differences(a, b, f"{prefix}{name}.")
        elif a != b:
            names.append(f"{prefix}{name}")
    return names


class Seconds(NamedTuple):
    """How long each part took; a shard that was there took no time."""

    images: float
    features: float


def fill(folder, identity, count, draw, network, *, at_once=SHARD):
    """Makes the shards of images 0 .. count - 1 that a folder lacks; returns (Store, Seconds).

    draw(start, stop) -> images uint8 (n, H, W, C), labels (n,) or None. network(images) ->
    {name: (n, ...)}; None on other processes than 0 if it runs there alone. All processes draw;
    process 0 writes, and the others get no Store. at_once: about how many images a call of draw
    should have.
    """
    store, starts = None, np.arange(0, count, SHARD)
    needed = np.zeros(len(starts), np.int32)
    with cluster.together():
        if jax.process_index() == 0:
            store = Store(folder, identity)
            for start, _ in store.missing(count):
                needed[start // SHARD] = 1
    if jax.process_count() > 1:
        needed = compat.process_allgather(needed)[0]
    groups = _groups(starts[needed == 1].tolist(), max(1, at_once // SHARD))
    done = sum(min(SHARD, count - start) for start in starts[needed == 0].tolist())
    to_images = to_features = 0.0
    with tqdm(total=count, initial=done, unit="image", disable=None) as bar:
        for first, last in groups:
            stop = min(last + SHARD, count)
            began = time.perf_counter()
            images, labels = draw(first, stop)
            drawn = time.perf_counter()
            found = network(images) if network else {}
            to_images += drawn - began
            to_features += time.perf_counter() - drawn
            with cluster.together():
                if store:
                    store.write(first, labels, found)
            bar.update(stop - first)
    return store, Seconds(to_images, to_features)


def _groups(starts, size):
    """[(first, last)] of at most `size` shards that follow each other."""
    groups = []
    for start in starts:
        if groups and start == groups[-1][1] + SHARD and start < groups[-1][0] + size * SHARD:
            groups[-1] = (groups[-1][0], start)
        else:
            groups.append((start, start))
    return groups
