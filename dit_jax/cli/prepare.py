"""Writes a folder of images, or ImageNet's tar of tars, into shards for training.

    dit-prepare ILSVRC2012_img_train.tar data/imagenet
    dit-prepare val_in_folders data/imagenet --split=validation

SRC is a folder with one folder of images for each class, or a tar with one tar for each class.
`tfds.builder_from_directory` opens OUT. It holds the bytes of the image files, unchanged, in a
random but fixed order; manifest.json holds class names, counts and the sha256 of every shard. Every
image is decoded once as a check: undecodable files are skipped and listed in manifest.json. To
resume after any interruption, repeat the command: the final bytes are the same.
"""

import os
import sys
import time

from absl import flags, logging

from dit_jax.cli import command, interrupt
from dit_jax.errors import UserError
from dit_jax.machine import words

MAX_NAMED = 10  # skipped files, and classes, that are logged by name


def define(values):
    options = {"flag_values": values}
    flags.DEFINE_string("split", "train", "Name of the split to write.", **options)
    flags.DEFINE_integer(
        "num_shards", 0, "Number of files; 0: files of about 256 MB.", lower_bound=0, **options
    )
    flags.DEFINE_integer(
        "processes", 0, "Number of worker processes; 0: one per core.", lower_bound=0, **options
    )
    flags.DEFINE_float(
        "max_corrupt",
        0.001,
        "Largest accepted share of files that cannot be decoded.",
        lower_bound=0.0,
        upper_bound=1.0,
        **options,
    )


def check(values, source, out):
    if not values.split.isidentifier():
        raise UserError(f"split must be a name like train, got {values.split!r}")
    command.check_exists("SRC", source)
    source, out = command.expand(source), command.output_folder(out)
    if out.resolve().is_relative_to(source.resolve()):
        raise UserError(f"OUT must be outside SRC, got {out} in {source}")


def main(values, source, out):
    source, out = command.expand(source), command.expand(out)
    from tqdm import tqdm

    from dit_jax.data import imagefolder, prepare

    interrupt.raise_from_here()  # an exception stops the worker processes and removes partial files
    listing = imagefolder.scan(source)
    started, num_read = time.perf_counter(), 0
    with tqdm(total=len(listing.examples), unit="image", disable=None) as bar:

        def on_progress(count, is_new):
            nonlocal num_read
            num_read += count * is_new
            bar.update(count)

        manifest = prepare.write(
            out,
            values.split,
            listing,
            num_shards=values.num_shards,
            processes=values.processes or len(os.sched_getaffinity(0)),
            max_corrupt=values.max_corrupt,
            on_start=lambda: describe(listing, source),
            on_progress=on_progress,
        )
    for name, reason in manifest["corrupt"][:MAX_NAMED]:
        logging.warning("skipped %s: %s", name, reason)
    if num_read:
        rate = num_read / (time.perf_counter() - started)
        logging.info("read %s, %.0f images/s", words.count(num_read, "image"), rate)
    numbers = (manifest["num_examples"], len(manifest["shards"]), len(manifest["corrupt"]))
    counts = map(words.count, numbers, ("image", "shard", "file"))
    logging.info("finished %s: %s, %s, %s skipped", out, *counts)


def describe(listing, source):
    """Logs what was found in the source."""
    names = ", ".join(listing.classes[:MAX_NAMED])
    more = ", ..." if len(listing.classes) > MAX_NAMED else ""
    images = words.count(len(listing.examples), "image")
    classes = words.count(len(listing.classes), "class", "classes")
    logging.info("%s of %s in %s: %s%s", images, classes, source, names, more)
    if listing.ignored:
        ignored = words.count(len(listing.ignored), "file")
        logging.warning("ignoring %s without an image, for example %s", ignored, listing.ignored[0])


def entry():
    options = {"takes": ("SRC", "OUT"), "uses_jax": False}
    sys.exit(command.run("dit-prepare", define, main, check=check, **options))


if __name__ == "__main__":
    entry()
