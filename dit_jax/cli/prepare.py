"""Writes a folder of images, or ImageNet's tar of tars, into shards to train from.

    dit-prepare ILSVRC2012_img_train.tar data/imagenet
    dit-prepare val_in_folders data/imagenet --split=validation

SRC is a folder with one folder of images for each class, or a tar with one tar for each class. OUT
opens with `tfds.builder_from_directory` and holds the bytes of the files as they are, in a random
order that is always the same, class names, counts and the sha256 of every shard in manifest.json.
Every image is decoded once: files that are no whole image are left out and named. Start the same
command again after anything that stopped it: it goes on, to the same bytes.
"""

import os
import sys
import time

from absl import flags, logging
from tqdm import tqdm

from dit_jax.cli import command
from dit_jax.data import imagefolder, shards
from dit_jax.errors import UserError

NAMED = 10  # files that are no images, of those that are left out


def define(values):
    options = {"flag_values": values}
    flags.DEFINE_string("split", "train", "Its name.", **options)
    flags.DEFINE_integer(
        "num_shards", 0, "Files to write; 0: of about 256 MB.", lower_bound=0, **options
    )
    flags.DEFINE_integer(
        "processes", 0, "At work at once; 0: one for each core.", lower_bound=0, **options
    )
    flags.DEFINE_float(
        "max_corrupt",
        0.001,
        "Share of the files that may be no whole images.",
        lower_bound=0,
        upper_bound=1,
        **options,
    )


def main(values, source, out):
    if not values.split.isidentifier():
        raise UserError(f"split must be a name as train, got {values.split!r}")
    source, out = command.expand(source), command.output_folder(out)
    if out.resolve().is_relative_to(source.resolve()):
        raise UserError(f"OUT must not lie in SRC, got {out} in {source}")
    listing = imagefolder.scan(source)
    count = len(listing.examples)
    logging.info("%d images of %d classes in %s", count, len(listing.classes), source)
    if listing.ignored:
        logging.warning("%d other files, as %s", len(listing.ignored), listing.ignored[0])
    started, new = time.perf_counter(), 0
    with tqdm(total=count, unit="image", disable=None) as bar:

        def tell(count, is_new):
            nonlocal new
            new += count * is_new
            bar.update(count)

        known = shards.write(
            out,
            values.split,
            listing,
            num_shards=values.num_shards,
            processes=values.processes or len(os.sched_getaffinity(0)),
            max_corrupt=values.max_corrupt,
            tell=tell,
        )
    for name, reason in known["corrupt"][:NAMED]:
        logging.warning("left out %s: %s", name, reason)
    if new:
        logging.info("read %d, %.0f images/s", new, new / (time.perf_counter() - started))
    numbers = (known["num_examples"], len(known["shards"]), len(known["corrupt"]))
    logging.info("%s is finished: images %d, shards %d, left out %d", out, *numbers)


def entry():
    sys.exit(command.run("dit-prepare", define, main, takes=("SRC", "OUT"), tidies=True))


if __name__ == "__main__":
    entry()
