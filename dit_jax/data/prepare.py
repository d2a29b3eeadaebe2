"""Writes labelled images into shards, in the directory layout of tensorflow-datasets.

A directory holds ArrayRecord shards of each split, the files that `tfds.builder_from_directory`
reads, and manifest.json. For each split the manifest counts the images of each class and of each
short side (pixels), and lists the sha256 of every shard and the files that were skipped. A record
holds the bytes of the original image file, unchanged.
"""

import collections
import concurrent.futures
import contextlib
import functools
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import threading
from pathlib import Path

import numpy as np

from dit_jax.data import arrayrecord, images
from dit_jax.errors import UserError
from dit_jax.machine import disk

SHARD_BYTES = 2**28
REFUSED = "refused"  # in PROGRESS: OUT may be used for other images
NAME = "images"  # the dataset's name, with which the name of every shard starts


def write(
    out,
    split,
    listing,
    *,
    num_shards=0,
    processes=1,
    max_corrupt=0.001,
    on_start=None,
    on_progress=None,
):
    """Writes a split, resuming an interrupted call, and returns its manifest.

    The order of the images is random but fixed, so all bytes are reproducible. num_shards=0 makes
    shards of about 256 MB. Files that cannot be decoded are skipped; UserError if their share
    exceeds max_corrupt. If the split is finished, only missing or cut shards are written again.
    Images are identified by name and size, so a changed file of the same size goes unnoticed.
    on_start() is called when everything has been checked and nothing written.
    on_progress(num_files, is_new) is called after each shard; is_new is False if the shard existed.
    """
    out = Path(out)
    if num_shards > len(listing.examples):
        raise UserError(f"num_shards must be at most {len(listing.examples)}, got {num_shards}")
    disk.make_folder(out, "OUT")
    with disk.locked(out, "OUT"):
        manifest = read_manifest(out)
        finished = manifest["splits"].get(split)
        num_shards = num_shards or _count_shards(listing, finished)
        source = _digest(listing, num_shards)
        _check_split(out, split, listing, manifest, source)
        _check_folder(out, manifest, source)
        if on_start:
            on_start()
        _start(out, source)
        order = np.random.default_rng(0).permutation(len(listing.examples))
        names = [shard_name(split, i, num_shards) for i in range(num_shards)]
        parts = [[listing.examples[i] for i in part] for part in np.array_split(order, num_shards)]
        jobs = dict(zip(names, parts, strict=True))
        pool = {"processes": processes, "on_progress": on_progress, "classes": listing.classes}
        if finished:
            _repair(out, manifest, finished, jobs, pool)
        else:
            try:
                shards = _write_all(out, jobs, max_corrupt=max_corrupt, **pool)
                summary = _summarize(listing, shards)
                _check_classes(summary)
            except UserError:  # the shards are kept for the same images and a larger max_corrupt
                (out / arrayrecord.PROGRESS / REFUSED).touch()
                raise
            manifest["classes"] = listing.classes
            manifest["splits"][split] = {"source": source, **summary}
            finish(out, manifest)
        return manifest["splits"][split]


def _count_shards(listing, finished):
    """The number of shards of the finished split, else enough for about 256 MB each."""
    if finished:
        return len(finished["shards"])
    return -(-sum(example.size for example in listing.examples) // SHARD_BYTES)


def _repair(out, manifest, finished, jobs, pool):
    """Writes the missing or cut shards of a finished split again."""
    entries = finished["shards"]
    names = [name for name in jobs if not arrayrecord.is_whole(out / name, entries[name])]
    written = _write_all(out, {name: jobs[name] for name in names}, max_corrupt=1, **pool)
    for name, shard in written.items():
        if shard["sha256"] != entries[name]["sha256"]:
            raise UserError(f"source must be the images of {out}, got others: {name} has changed")
    if names or not _opens(out):
        finish(out, manifest)
    arrayrecord.remove_notes(out)


def read_manifest(out):
    """The manifest of a directory; {"classes": [], "splits": {}} if no split is finished."""
    return {"classes": [], "splits": {}} | disk.read_json(disk.path(out) / "manifest.json")


def shard_name(split, i, num_shards):
    return f"{NAME}-{split}.array_record-{i:05d}-of-{num_shards:05d}"


def _digest(listing, num_shards):
    """A hex digest of the number of shards and of all classes, names, labels and sizes."""
    examples = [(example.name, example.label, example.size) for example in listing.examples]
    return hashlib.sha256(json.dumps([num_shards, listing.classes, examples]).encode()).hexdigest()


def _check_split(out, split, listing, manifest, source):
    """UserError if the finished splits of the manifest do not fit this split."""
    finished = manifest["splits"].get(split)
    if finished and finished["source"] != source:
        count = len(finished["shards"])
        if finished["source"] == _digest(listing, count):
            raise UserError(f"num_shards must be {count}, as in the finished {split} of {out}")
        raise UserError(
            f"split must be a new name in {out}, got {split}, which has other images: choose "
            "another OUT or delete this one"
        )
    if manifest["splits"] and manifest["classes"] != listing.classes:
        name = min(set(manifest["classes"]) ^ set(listing.classes))
        raise UserError(f"classes must be the same as in {out}, but only one of both has {name}")


def _check_folder(out, manifest, source):
    """UserError if the folder holds foreign files or an unfinished run with other images."""
    note = out / arrayrecord.PROGRESS / "source"
    if not manifest["splits"] and not note.exists():
        foreign = sorted(path.name for path in out.iterdir() if not disk.is_clutter(path.name))
        if foreign:
            raise UserError(
                f"OUT must be new, empty or written by dit-prepare, got {out} with {foreign[0]}"
            )
    if note.exists() and note.read_text() != source and not _is_worthless(out):
        raise UserError(
            "OUT must be new or unfinished with the same images and num_shards, "
            f"got {out}: delete it to start again"
        )


def _is_worthless(out):
    """Whether an unfinished run finished no shard, or was refused for its images."""
    notes = out / arrayrecord.PROGRESS
    return (notes / REFUSED).exists() or not any(notes.glob("*.json"))


def _start(out, source):
    """Makes the folder for progress and deletes the leftovers of a killed run.

    Shards of other images, which `_check_folder` found worthless, are deleted too.
    """
    notes = out / arrayrecord.PROGRESS
    if (notes / "source").exists() and (notes / "source").read_text() != source:
        for note in notes.glob("*.json"):
            (out / note.stem).unlink(missing_ok=True)
        shutil.rmtree(notes)
    notes.mkdir(exist_ok=True)
    (notes / REFUSED).unlink(missing_ok=True)
    arrayrecord.remove_partials(out)
    disk.write_text(out / arrayrecord.PROGRESS / "source", source)


def _write_all(out, jobs, *, classes, processes, max_corrupt, on_progress):
    """Writes shards {name: examples} in several processes and returns {name: entry}."""
    shards, corrupt = dict.fromkeys(jobs), 0
    count = sum(map(len, jobs.values()))
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(
        processes, context, initializer=_die_with_parent
    ) as pool:
        try:
            with _delayed_interrupts():
                futures = {
                    pool.submit(_write_shard, out, name, part, classes): name
                    for name, part in jobs.items()
                }
            for future in concurrent.futures.as_completed(futures):
                shard, is_new = future.result()
                shards[futures[future]] = shard
                corrupt += len(shard["corrupt"])
                if on_progress:
                    on_progress(shard["examples"] + len(shard["corrupt"]), is_new)
                if corrupt > max_corrupt * count:
                    name, reason = shard["corrupt"][0]
                    raise UserError(
                        f"max_corrupt must be at least {corrupt / count:.2g}, got {max_corrupt:g}: "
                        f"at least {corrupt} of {count} files cannot be decoded, "
                        f"for example {name}: {reason}"
                    )
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return shards


@contextlib.contextmanager
def _delayed_interrupts():
    """Delays SIGINT and SIGTERM to the end; processes started inside ignore SIGINT.

    A worker that is interrupted during its start would print a traceback.
    """
    received, handlers = [], {}
    if threading.current_thread() is threading.main_thread():  # only this one may set handlers
        for signum in (signal.SIGINT, signal.SIGTERM):
            handlers[signum] = signal.signal(signum, lambda signum, _: received.append(signum))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # the workers inherit this
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
        if received:
            signal.raise_signal(received[0])


def _die_with_parent():
    """Ends this worker process when its parent ends, even if the parent was killed."""

    def watch():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _write_shard(out, name, examples, classes):
    """Writes a shard unless it exists, and notes its entry. Returns the entry and whether new."""
    note = out / arrayrecord.PROGRESS / f"{name}.json"
    if (shard := disk.read_json(note)) and arrayrecord.is_whole(out / name, shard):
        return shard, False
    partial = arrayrecord.partial_path(out / name)
    serialize = _serializer(tuple(classes))
    counts, sides, corrupt, size = collections.Counter(), collections.Counter(), [], 0
    with arrayrecord.open_writer(partial) as writer:
        for example in examples:
            data = example.read()
            try:
                sides[min(images.decode(data).size)] += 1
            except UserError as error:
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
        **arrayrecord.seal(partial, out / name),
    }
    disk.write_text(note, json.dumps(shard))
    return shard, True


@functools.cache
def _serializer(classes):
    """serialize(name, data, label) -> the bytes of a record."""
    from tensorflow_datasets.core import example_serializer

    features = make_features(classes)
    serializer = example_serializer.ExampleSerializer(features.get_serialized_info())

    def serialize(name, data, label):
        # The image is given as its file's bytes. A protobuf map has no fixed order by default.
        example = {"file_name": name.encode(), "image": data, "label": label}
        return serializer.get_tf_example(example).SerializeToString(deterministic=True)

    return serialize


def make_features(classes):
    """The tensorflow-datasets features of a record."""
    import tensorflow_datasets as tfds

    return tfds.features.FeaturesDict(
        {
            "file_name": tfds.features.Text(),
            "image": tfds.features.Image(encoding_format="jpeg"),
            "label": tfds.features.ClassLabel(names=list(classes)),
        }
    )


def _summarize(listing, shards):
    """The manifest of a split, from the entries of its shards."""
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


def _check_classes(summary):
    """UserError if no image of a class could be decoded."""
    for name, count in summary["classes"].items():
        if not count:
            corrupt = [each for each in summary["corrupt"] if each[0].startswith(f"{name}/")]
            raise UserError(
                f"every class must have an image that can be decoded, got none for {name}: "
                f"{': '.join(corrupt[0])}"
            )


def finish(out, manifest):
    """Writes the metadata of tensorflow-datasets, then the manifest, and removes the notes."""
    import tensorflow_datasets as tfds

    template = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    infos = [
        tfds.core.SplitInfo(
            name=name,
            shard_lengths=[shard["examples"] for shard in split["shards"].values()],
            num_bytes=split["num_bytes"],
            filename_template=tfds.core.ShardedFileTemplate(
                data_dir=out,
                dataset_name=NAME,
                split=name,
                filetype_suffix="array_record",
                template=template,
            ),
        )
        for name, split in sorted(manifest["splits"].items())
    ]
    tfds.folder_dataset.write_metadata(
        data_dir=out,
        features=make_features(manifest["classes"]),
        split_infos=infos,
        filename_template=template,
        check_data=False,
    )
    disk.write_text(out / "manifest.json", json.dumps(manifest, indent=1) + "\n")
    arrayrecord.remove_notes(out)


def _opens(out):
    """Whether tensorflow-datasets opens the directory."""
    import tensorflow_datasets as tfds

    try:
        tfds.builder_from_directory(out)
    except Exception:  # it raises several types
        return False
    return True
