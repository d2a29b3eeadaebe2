"""Labelled images in shards of ArrayRecord, as tensorflow-datasets lays them out, written and read.

A directory holds SPLIT's shards, what `tfds.builder_from_directory` opens them by, and
manifest.json: of every split the images of each class, how many have a short side of so many
pixels, and the sha256 of every shard. The bytes of the images are those of their files.
"""

import collections
import concurrent.futures
import contextlib
import fcntl
import functools
import hashlib
import json
import multiprocessing
import os
import shutil
import threading
from pathlib import Path

import numpy as np
from array_record.python import array_record_module

from dit_jax.data import images

SHARD_BYTES = 2**28
NAME = "images"  # of the dataset, before the split in the name of a shard
PROGRESS = ".progress"


def write(out, split, listing, *, num_shards=0, processes=1, max_corrupt=0.001, tell=None):
    """Writes the split; what an earlier, interrupted call has written stays. The split's manifest.

    The order is random and always the same, and so is every byte. num_shards 0: of about 256 MB.
    Files that are no whole image are left out; where they are more than the share max_corrupt, all
    is stopped. tell(count) is called as images are written.
    """
    out = Path(out)
    size = sum(example.size for example in listing.examples)
    num_shards = num_shards or -(-size // SHARD_BYTES)
    if num_shards > len(listing.examples):
        raise ValueError(f"num_shards must be at most {len(listing.examples)}, got {num_shards}")
    out.mkdir(parents=True, exist_ok=True)
    with locked(out):
        manifest = read_manifest(out)
        source = _digest(listing, num_shards)
        if manifest["splits"].get(split, {}).get("source") == source:  # finished before
            remove_notes(out)
            return manifest["splits"][split]
        _check_fresh(out, split, listing, manifest, source)
        order = np.random.default_rng(0).permutation(len(listing.examples))
        names = [shard_name(split, i, num_shards) for i in range(num_shards)]
        parts = [[listing.examples[i] for i in part] for part in np.array_split(order, num_shards)]
        limit = int(max_corrupt * len(order))
        shards = _write_all(out, names, parts, listing.classes, processes, limit, tell)
        manifest["classes"] = listing.classes
        summary = _summarize(listing, dict(zip(names, shards, strict=True)))
        manifest["splits"][split] = {"source": source, **summary}
        _finish(out, manifest)
        return manifest["splits"][split]


def read_manifest(out):
    """The manifest of a directory; one without splits where nothing is finished."""
    path = Path(out) / "manifest.json"
    return json.loads(path.read_text()) if path.exists() else {"classes": [], "splits": {}}


def shard_name(split, i, num_shards):
    return f"{NAME}-{split}.array_record-{i:05d}-of-{num_shards:05d}"


@contextlib.contextmanager
def locked(out):
    """Holds the directory; ValueError where another process does."""
    with open(out / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(f"OUT must not be written by another run, got {out}") from error
        yield


def _digest(listing, num_shards):
    """What a split is written from, wherever it lies: changes with any name, label or size."""
    examples = [(example.name, example.label, example.size) for example in listing.examples]
    return hashlib.sha256(json.dumps([num_shards, listing.classes, examples]).encode()).hexdigest()


def _check_fresh(out, split, listing, manifest, source):
    """ValueError where the directory holds something else; makes the place for what is done."""
    if split in manifest["splits"]:
        raise ValueError(f"split must be a new one of {out}, got {split}, which has other images")
    if manifest["splits"] and manifest["classes"] != listing.classes:
        one = min(set(manifest["classes"]) ^ set(listing.classes))
        raise ValueError(f"classes must be those of {out}, but {one} is in one of both only")
    plan = out / PROGRESS / "source"
    if not manifest["splits"] and not plan.exists():
        strange = sorted(
            path.name for path in out.iterdir() if path.name not in (".lock", PROGRESS)
        )
        if strange:
            raise ValueError(f"OUT must be new, empty or of dit-prepare, got {out}: {strange[0]}")
    if plan.exists() and plan.read_text() != source:
        raise ValueError(f"source must be that of the unfinished {out}, or that be removed first")
    (out / PROGRESS).mkdir(exist_ok=True)
    for path in [*out.glob(".partial-*"), *(out / PROGRESS).glob(".partial-*")]:
        path.unlink()  # of a run that was killed
    write_text(plan, source)


def _write_all(out, names, parts, classes, processes, limit, tell):
    """Writes the shards that are not there yet, several at once; what is known of each."""
    shards, corrupt = [None] * len(names), 0
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(
        processes, context, initializer=_die_with_parent
    ) as pool:
        jobs = {
            pool.submit(_write_shard, out, name, part, classes): i
            for i, (name, part) in enumerate(zip(names, parts, strict=True))
        }
        try:
            for job in concurrent.futures.as_completed(jobs):
                shard = shards[jobs[job]] = job.result()
                corrupt += len(shard["corrupt"])
                if tell:
                    tell(shard["examples"] + len(shard["corrupt"]))
                if corrupt > limit:
                    name, reason = shard["corrupt"][0]
                    raise ValueError(
                        f"max_corrupt must be enough: more than {limit} files are no whole images, "
                        f"as {name}: {reason}"
                    )
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return shards


def _write_shard(out, name, examples, classes):
    """Writes one shard, unless it is there, and notes what is known of it."""
    note = out / PROGRESS / f"{name}.json"
    if note.exists():
        shard = json.loads(note.read_text())
        if (out / name).is_file() and (out / name).stat().st_size == shard["file_bytes"]:
            return shard
    aside = out / f".partial-{os.getpid()}-{name}"
    serialize = _serializer(tuple(classes))
    counts, sides, corrupt, size = collections.Counter(), collections.Counter(), [], 0
    with open_writer(aside) as writer:
        for example in examples:
            data = example.read()
            try:
                sides[min(images.decode(data).size)] += 1
            except ValueError as error:
                corrupt.append([example.name, str(error)])
                continue
            record = serialize(example.name, data, example.label)
            writer.write(record)
            counts[classes[example.label]] += 1
            size += len(record)
    shard = {
        "examples": counts.total(),
        "bytes": size,
        "classes": dict(counts),
        "short_sides": dict(sides),
        "corrupt": corrupt,
        **seal(aside, out / name),
    }
    write_text(note, json.dumps(shard))
    return shard


@contextlib.contextmanager
def open_writer(path):
    """A writer of records; OSError where the place does not take them, as a disk that is full."""
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1,uncompressed")
    try:
        yield writer
        writer.close()
    except RuntimeError as error:
        reason = str(error).partition(";")[0]
        raise OSError(f"{path} cannot be written: {reason}; what is whole is kept") from error


def seal(aside, path):
    """Moves a written file to its place, on the disk for sure: {"file_bytes", "sha256"}."""
    with aside.open("rb") as file:
        os.fsync(file.fileno())
    known = {"file_bytes": aside.stat().st_size, "sha256": sha256(aside)}
    aside.rename(path)
    return known


def sha256(path):
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_files(path, known):
    """ValueError where one of the shards {name: {"file_bytes"}} is missing or cut short."""
    for name, shard in known.items():
        size = (path / name).stat().st_size if (path / name).is_file() else 0
        if size != shard["file_bytes"]:
            raise ValueError(
                f"{path / name} must have {shard['file_bytes']} bytes, got {size}: copy it again"
            )


@functools.cache
def _serializer(classes):
    """serialize(name, data, label) -> the bytes of a record."""
    from tensorflow_datasets.core import example_serializer

    features = make_features(classes)
    serializer = example_serializer.ExampleSerializer(features.get_serialized_info())

    def serialize(name, data, label):
        # An image's bytes are its encoded form already. A map of protobuf has no order of its own.
        example = {"file_name": name.encode(), "image": data, "label": label}
        return serializer.get_tf_example(example).SerializeToString(deterministic=True)

    return serialize


def make_features(classes):
    """The features of a record, in the terms of tensorflow-datasets."""
    import tensorflow_datasets as tfds

    return tfds.features.FeaturesDict(
        {
            "file_name": tfds.features.Text(),
            "image": tfds.features.Image(encoding_format="jpeg"),
            "label": tfds.features.ClassLabel(names=list(classes)),
        }
    )


def _summarize(listing, shards):
    """The manifest of a split."""
    counts, sides = collections.Counter(), collections.Counter()
    for shard in shards.values():
        counts.update(shard["classes"])
        sides.update({int(side): count for side, count in shard["short_sides"].items()})
    return {
        "num_examples": sum(shard["examples"] for shard in shards.values()),
        "num_bytes": sum(shard["bytes"] for shard in shards.values()),
        "classes": {name: counts[name] for name in listing.classes},
        "short_sides": dict(sorted(sides.items())),
        "shards": {
            name: {key: shard[key] for key in ("examples", "file_bytes", "sha256")}
            for name, shard in shards.items()
        },
        "corrupt": sorted(entry for shard in shards.values() for entry in shard["corrupt"]),
        "ignored": len(listing.ignored),
    }


def _finish(out, manifest):
    """Writes what opens the directory, the manifest last, and removes the notes."""
    import tensorflow_datasets as tfds

    template = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    infos = [
        tfds.core.SplitInfo(
            name=split,
            shard_lengths=[shard["examples"] for shard in known["shards"].values()],
            num_bytes=known["num_bytes"],
            filename_template=tfds.core.ShardedFileTemplate(
                data_dir=out,
                dataset_name=NAME,
                split=split,
                filetype_suffix="array_record",
                template=template,
            ),
        )
        for split, known in sorted(manifest["splits"].items())
    ]
    tfds.folder_dataset.write_metadata(
        data_dir=out,
        features=make_features(manifest["classes"]),
        split_infos=infos,
        filename_template=template,
        check_data=False,
    )
    write_text(out / "manifest.json", json.dumps(manifest, indent=1) + "\n")
    remove_notes(out)


def remove_notes(out):
    if (out / PROGRESS).exists():
        shutil.rmtree(out / PROGRESS)


def write_text(path, text):
    """Writes a whole file or none."""
    aside = path.with_name(f".partial-{os.getpid()}-{path.name}")
    aside.write_text(text)
    aside.replace(path)


def _die_with_parent():
    """Ends this process as soon as its parent has ended, which may have been killed."""

    def watch():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
