"""Generates images from a checkpoint: a PNG grid, a folder of PNGs, or one .npz.

    dit-sample runs/digits samples.png --labels=3,1,4
    dit-sample runs/xl2 grid.png --vae=runs/vae --labels=207,360 --cfg_scale=4
    dit-sample runs/shapes --labels="red circle,blue square" --num_samples=20
    dit-sample runs/xl2 samples.npz --labels=all --num_samples=50000

CHECKPOINT and OUT can also be given as --checkpoint and --out. The checkpoint is a training run,
one step in its `checkpoints`, or a converted checkpoint. Options that are not given come from the
run's config. --vae, a checkpoint of `dit-convert vae`, decodes latents. An .npz holds arr_0: uint8
(N, H, W, C), as ADM's evaluation reads it, or, without a vae, float32 latents in model units. A
folder holds 00000.png, 00001.png, ...

--labels takes numbers, ranges (0-9, both ends included), names of classes, and `all`, separated by
commas. A name in double quotes may hold commas: --labels='"red, round",blue'. A number is always a
label; for a class whose name is a number, quote it. --labels_file has one of these a line, and
there a name needs no quotes. --num_samples=N repeats the labels in turn, or cuts them off, to N.
"""

import sys

from absl import flags, logging

import dit_jax
from dit_jax import settings
from dit_jax.cli import arguments, command
from dit_jax.errors import UserError
from dit_jax.machine import words
from dit_jax.sampling import fields
from dit_jax.sampling import labels as labels_lib


def define(values):
    options = {"flag_values": values}
    flags.DEFINE_string(
        "checkpoint", None, "A run's directory or a converted checkpoint.", **options
    )
    text = "Classes, separated by commas: numbers, ranges as 0-9, names, or all."
    flags.DEFINE_string("labels", None, text, **options)
    flags.DEFINE_string("labels_file", None, "A file with a label or a name a line.", **options)
    flags.DEFINE_integer(
        "num_samples",
        None,
        "How many images; the labels repeat, or are cut off, to reach it.",
        lower_bound=1,
        **options,
    )
    flags.DEFINE_string(
        "out", "samples.png", "A .png (small images enlarged), an .npz or a new folder.", **options
    )
    flags.DEFINE_string("vae", None, "The autoencoder that decodes latents.", **options)
    flags.DEFINE_enum(
        "vae_dtype", "float32", ["float32", "bfloat16"], "Arithmetic of the vae.", **options
    )
    flags.DEFINE_enum("weights", "ema", ["ema", "params"], "EMA or plain parameters.", **options)
    command.define_seed(values)
    flags.DEFINE_integer("batch_size", 256, "Images at a time.", lower_bound=1, **options)
    flags.DEFINE_integer("columns", 0, "Of the grid; 0: about square.", lower_bound=0, **options)
    arguments.define_sampling(values)


def check(values):
    out = command.expand(values.out)
    if not out.suffix and out.exists():
        raise UserError(f"out must be a new folder, got {out}, which exists")
    out = command.output_path(values.out)
    if out.suffix not in (".png", ".npz", ""):
        raise UserError(f"out must end with .png or .npz, or be a new folder, got {out}")
    if (values.labels is None) == (values.labels_file is None):
        given = "both" if values.labels else "neither"
        raise UserError(f"--labels must be given, or --labels_file instead of it, got {given}")
    if values.labels:
        labels_lib.split(values.labels)
    elif not command.expand(values.labels_file).is_file():
        raise UserError(f"labels_file must be a file that exists, got {values.labels_file}")
    else:
        labels_lib.read_lines(command.expand(values.labels_file))
    settings.read_topic(settings.Sampling, arguments.sampling(values))
    known = fields.look(values.checkpoint)
    if values.vae:
        fields.check_vae(values.vae, known)
    if known:
        find_labels(values, known.class_names, known.model.num_classes, warns=False)
        check_format(out, known.settings.data.space, values.vae)
        fields.check_options(known, arguments.sampling(values))


def check_format(out, space, vae):
    """UserError if the samples of a space cannot be written to the file out."""
    if space != "pixels" and not vae and out.suffix != ".npz":
        raise UserError(f"out must end with .npz for latents without a --vae, got {out}")


def main(values):
    out = command.output_path(values.out)
    import numpy as np

    from dit_jax.sampling import pictures

    dit = dit_jax.load(
        values.checkpoint, weights=values.weights, vae=values.vae, vae_dtype=values.vae_dtype
    )
    labels = read_labels(values, dit)
    check_format(out, dit.space, values.vae)
    options = {"seed": values.seed, "batch_size": values.batch_size, "progress": True}
    images = dit.sample(labels, **options, **arguments.sampling(values))
    if out.suffix == ".npz":
        np.savez(out, images)
    elif not out.suffix:
        pictures.write_all(images, out)
    else:
        scale = pictures.grid_scale(images.shape[1:3])
        names = dit.class_names
        options = {"columns": values.columns, "scale": scale}
        pictures.grid_of_classes(images, labels, names, **options).save(out)
    logging.info("%s of step %d: %s", words.count(len(images), "image"), dit.step, out)


def read_labels(values, dit):
    """The labels of the flags for a LoadedDiT, a list of numbers."""
    import numpy as np

    from dit_jax.sampling import arguments

    labels = find_labels(values, dit.class_names, dit.config.num_classes)
    count = values.num_samples or len(labels)
    arguments.check_room("num_samples", count, dit.config)
    return np.resize(labels, count).tolist()


def find_labels(values, class_names, num_classes, **options):
    """The labels of the flags, each once; options: of `labels.parse`."""
    classes = class_names, num_classes
    if values.labels_file is None:
        return labels_lib.parse(values.labels, *classes, **options)
    return labels_lib.read_file(command.expand(values.labels_file), *classes, **options)


def entry():
    options = {"required": ["checkpoint"], "words": ["checkpoint", "out"]}
    sys.exit(command.run("dit-sample", define, main, check=check, **options))


if __name__ == "__main__":
    entry()
