"""Labelled images in shards of ArrayRecord, as tensorflow-datasets lays them out, written and read.

A directory holds SPLIT's shards, what `tfds.builder_from_directory` opens them by, and
manifest.json: of every split the images of each class, how many have a short side of so many
pixels, and the sha256 of every shard. The bytes of the images are those of their files.
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
from array_record.python import array_record_module

from dit_jax.data import images
from dit_jax.errors import UserError
from dit_jax.machine import disk

SHARD_BYTES = 2**28
NAME = "images"  # of the dataset, before the split in the name of a shard
PROGRESS = ".progress"


def write(out, split, listing, *, num_shards=0, processes=1, max_corrupt=0.001, tell=None):
    """Writes the split; what an earlier, interrupted call has written stays. The split's manifest.

    The order is random and always the same, and so is every byte. num_shards 0: of about 256 MB.
    Files that are no whole image are left out; where they are more than the share max_corrupt, all
    is stopped. What a finished split has lost since is written again. Images are known by name and
    size: new content of the same size goes unseen. tell(count, is_new) is called as shards are
    there.
    """
    out = Path(out)
    if num_shards > len(listing.examples):
        raise UserError(f"num_shards must be at most {len(listing.examples)}, got {num_shards}")
    out.mkdir(parents=True, exist_ok=True)
    with disk.locked(out, "OUT"):
        manifest = read_manifest(out)
        known = manifest["splits"].get(split)
        num_shards = num_shards or _count_shards(listing, known)
        source = _digest(listing, num_shards)
        _check_fresh(out, split, listing, manifest, source)
        order = np.random.default_rng(0).permutation(len(listing.examples))
        names = [shard_name(split, i, num_shards) for i in range(num_shards)]
        parts = [[listing.examples[i] for i in part] for part in np.array_split(order, num_shards)]
        jobs = dict(zip(names, parts, strict=True))
        pool = {"processes": processes, "tell": tell, "classes": listing.classes}
        if known:
            _mend(out, manifest, known, jobs, pool)
        else:
            written = _write_all(out, jobs, max_corrupt=max_corrupt, **pool)
            manifest["classes"] = listing.classes
            manifest["splits"][split] = {"source": source, **_summarize(listing, written)}
            _finish(out, manifest)
        return manifest["splits"][split]


def _count_shards(listing, known):
    """As many as the finished split has, or of about 256 MB."""
    if known:
        return len(known["shards"])
    return -(-sum(example.size for example in listing.examples) // SHARD_BYTES)


def _mend(out, manifest, known, jobs, pool):
    """Writes again what a finished split has lost since."""
    names = [name for name in jobs if not is_whole(out / name, known["shards"][name])]
    written = _write_all(out, {name: jobs[name] for name in names}, max_corrupt=1, **pool)
    for name, shard in written.items():
        if shard["sha256"] != known["shards"][name]["sha256"]:
            raise UserError(f"source must be that of {out}: {name} has become another one")
    if names or not _opens(out):
        _finish(out, manifest)
    remove_notes(out)


def read_manifest(out):
    """The manifest of a directory; one without splits where nothing is finished."""
    return {"classes": [], "splits": {}} | disk.read_json(Path(out) / "manifest.json")


def shard_name(split, i, num_shards):
    return f"{NAME}-{split}.array_record-{i:05d}-of-{num_shards:05d}"


def _digest(listing, num_shards):
    """What a split is written from, wherever it lies: changes with any name, label or size."""
    examples = [(example.name, example.label, example.size) for example in listing.examples]
    return hashlib.sha256(json.dumps([num_shards, listing.classes, examples]).encode()).hexdigest()


def _check_fresh(out, split, listing, manifest, source):
    """UserError where the directory holds something else; makes the place for what is done."""
    known = manifest["splits"].get(split)
    if known and known["source"] != source:
        count = len(known["shards"])
        if known["source"] == _digest(listing, count):
            raise UserError(f"num_shards must be {count}, as many as {split} of {out} has")
        raise UserError(f"split must be a new one of {out}, got {split}, which has other images")
    if manifest["splits"] and manifest["classes"] != listing.classes:
        one = min(set(manifest["classes"]) ^ set(listing.classes))
        raise UserError(f"classes must be those of {out}, but {one} is in one of both only")
    plan = out / PROGRESS / "source"
    if not manifest["splits"] and not plan.exists():
        strange = sorted(
            path.name for path in out.iterdir() if path.name not in (".lock", PROGRESS)
        )
        if strange:
            raise UserError(f"OUT must be new, empty or of dit-prepare, got {out}: {strange[0]}")
    if plan.exists() and plan.read_text() != source:
        raise UserError(
            f"OUT must be unfinished with the same images and num_shards, got {out}: "
            "remove it to start anew"
        )
    (out / PROGRESS).mkdir(exist_ok=True)
    for path in [*out.glob(".partial-*"), *(out / PROGRESS).glob(".partial-*")]:
        path.unlink()  # of a run that was killed
    disk.write_text(plan, source)


def _write_all(out, jobs, *, classes, processes, max_corrupt, tell):
    """{name: what is known of it} of shards, written several at once where they are not there."""
    shards, corrupt = dict.fromkeys(jobs), 0
    count = sum(map(len, jobs.values()))
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(
        processes, context, initializer=_die_with_parent
    ) as pool:
        try:
            with _interrupts_held():
                futures = {
                    pool.submit(_write_shard, out, name, part, classes): name
                    for name, part in jobs.items()
                }
            for future in concurrent.futures.as_completed(futures):
                shard, is_new = future.result()
                shards[futures[future]] = shard
                corrupt += len(shard["corrupt"])
                if tell:
                    tell(shard["examples"] + len(shard["corrupt"]), is_new)
                if corrupt > max_corrupt * count:
                    name, reason = shard["corrupt"][0]
                    raise UserError(
                        f"max_corrupt must be at least {corrupt / count:.2g}, got {max_corrupt:g}: "
                        f"{corrupt} or more of {count} files are no whole images, as {name}: "
                        f"{reason}"
                    )
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return shards


@contextlib.contextmanager
def _interrupts_held():
    """Lets SIGINT and SIGTERM wait; processes that are started inside never hear of SIGINT.

    A worker whose start is broken off complains of what it does not find.
    """
    held, handlers = [], {}
    if threading.current_thread() is threading.main_thread():  # no other one handles signals
        for signum in (signal.SIGINT, signal.SIGTERM):
            handlers[signum] = signal.signal(signum, lambda signum, _: held.append(signum))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # inherited
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
        if held:
            signal.raise_signal(held[0])


def _write_shard(out, name, examples, classes):
    """Writes one shard, unless it is there, and notes it: what is known of it, is it new."""
    note = out / PROGRESS / f"{name}.json"
    if (shard := disk.read_json(note)) and is_whole(out / name, shard):
        return shard, False
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
    disk.write_text(note, json.dumps(shard))
    return shard, True


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
    known = {"file_bytes": aside.stat().st_size, "sha256": disk.sha256(aside)}
    aside.rename(path)
    return known


def is_whole(path, known):
    """Whether a shard is there and has as many bytes as are known of it."""
    return path.is_file() and path.stat().st_size == known["file_bytes"]


def check_files(path, known):
    """UserError where one of the shards {name: {"file_bytes"}} is missing or cut short."""
    for name, shard in known.items():
        if not is_whole(path / name, shard):
            size = f"{(path / name).stat().st_size}" if (path / name).is_file() else "no file"
            raise UserError(
                f"{path / name} must have {shard['file_bytes']} bytes, got {size}: "
                "start the command that wrote it again, or copy it again"
            )


def check_digest(path, known):
    """UserError where the bytes of a shard {"file_bytes", "sha256"} are not those written."""
    check_files(path.parent, {path.name: known})
    if disk.sha256(path) != known["sha256"]:
        raise UserError(f"{path} is damaged: its sha256 is not {known['sha256']}")


def read_record(records, index, path):
    """Record `index` of a data source; UserError where the bytes on the disk are damaged."""
    try:
        return records[index]
    except RuntimeError as error:
        reason = str(error).partition(";")[0]
        raise UserError(
            f"example {index} of {path} cannot be read: its shard is damaged, copy it again: "
            f"{reason}"
        ) from error


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
    disk.write_text(out / "manifest.json", json.dumps(manifest, indent=1) + "\n")
    remove_notes(out)


def remove_notes(out):
    if (out / PROGRESS).exists():
        shutil.rmtree(out / PROGRESS)


def _opens(out):
    """Whether tensorflow-datasets opens the directory."""
    import tensorflow_datasets as tfds

    try:
        tfds.builder_from_directory(out)
    except Exception:  # it raises several types
        return False
    return True


def _die_with_parent():
    """Ends this process as soon as its parent has ended, which may have been killed."""

    def watch():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
