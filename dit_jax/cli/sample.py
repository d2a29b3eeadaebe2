"""Generates images from a checkpoint: a PNG grid, a folder of PNGs, or one .npz.

    dit-sample runs/digits samples.png --labels=3,1,4
    dit-sample runs/xl2 grid.png --vae=runs/vae --labels=207,360 --cfg_scale=4
    dit-sample runs/shapes --labels="red circle,blue square" --num_samples=20
    dit-sample runs/xl2 samples.npz --labels=all --num_samples=50000
    dit-sample runs/digits fast.png --labels=0-9 --sampler=unipc --num_steps=20
    dit-sample runs/digits way.gif --labels=0-9 --trajectory
    dit-sample runs/digits table.png --labels=0-9 --grid=cfg_scale=1,1.5,4
    dit-sample runs/digits between.png --interpolate=3,8
    dit-sample runs/digits fast.png --labels=0-9 --num_steps=50 --cache=every:3
    dit-sample runs/digits schedule.json --num_steps=50 --calibrate=20

CHECKPOINT and OUT can also be given as --checkpoint and --out. The checkpoint is a training run,
one step in its `checkpoints`, or a converted checkpoint. Options that are not given come from the
run's config. --vae, a checkpoint of `dit-convert vae`, decodes latents. An .npz holds arr_0: uint8
(N, H, W, C), as ADM's evaluation reads it, or, without a vae, float32 latents in model units. A
folder holds 00000.png, 00001.png, ...

--labels takes numbers, ranges (0-9, both ends included), names of classes, and `all`, separated by
commas. A name in double quotes may hold commas: --labels='"red, round",blue'. A number is always a
label; for a class whose name is a number, quote it. --labels_file has one of these a line, and
there a name needs no quotes. --num_samples=N repeats the labels in turn, or cuts them off, to N.

Three pictures compare images that start from the same noise. --trajectory shows x_t and the x0
predicted from it: in a .png at --columns steps, in a .gif as an animation. --grid=OPTION=VALUE,...
has a row for each value of seed or of an option of sampling, and a column for each label.
--interpolate=CLASS,CLASS takes the place of --labels: --num_samples images, 8 by default, go in
equal steps from the first class to the last; a title is the share of the next class.

--calibrate=N draws samples of --labels, by default of 16 random ones, and prints a schedule for
--cache that computes N steps: where the first block of the network changes most. --calibrate=0.1
computes a step whenever that block has changed by a tenth. OUT, if it is given, is a .json.
"""

import json
import sys

from absl import flags, logging

import dit_jax
from dit_jax import settings
from dit_jax.cli import arguments, command
from dit_jax.errors import UserError
from dit_jax.machine import words
from dit_jax.sampling import fields
from dit_jax.sampling import labels as labels_lib

GRID = {"seed": int} | fields.SWEPT  # what --grid varies
CLASSES = ("labels", "labels_file", "interpolate")
BETWEEN, MIXED_COLUMNS = 7, 10  # steps of --interpolate from class to class, and images in a row
RANDOM = 16  # images of a calibration without labels
MAX_SHOWN = 100  # images in a row of --trajectory and --grid


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
        "out",
        "samples.png",
        "A .png (small images enlarged), a .gif of --trajectory, an .npz or a new folder.",
        **options,
    )
    text = "Two classes or more, between which images are drawn, instead of --labels."
    flags.DEFINE_string("interpolate", None, text, **options)
    text = "Show x_t and the predicted x0 on the way to each image; OUT is a .png or a .gif."
    flags.DEFINE_boolean("trajectory", False, text, **options)
    text = f"OPTION=VALUE,...: a row for each value. OPTION is one of {', '.join(GRID)}."
    flags.DEFINE_string("grid", None, text, **options)
    flags.DEFINE_string("vae", None, "The autoencoder that decodes latents.", **options)
    flags.DEFINE_enum(
        "vae_dtype", "float32", ["float32", "bfloat16"], "Arithmetic of the vae.", **options
    )
    flags.DEFINE_enum("weights", "ema", ["ema", "params"], "EMA or plain parameters.", **options)
    command.define_seed(values)
    flags.DEFINE_integer("batch_size", 256, "Images at a time.", lower_bound=1, **options)
    text = "Of the picture; 0: about square, 8 of --trajectory, 10 of --interpolate."
    flags.DEFINE_integer("columns", 0, text, lower_bound=0, **options)
    text = "Print a schedule for --cache with so many steps, or, below 1, with this threshold."
    flags.DEFINE_float("calibrate", None, text, **options)
    arguments.define_sampling(values)


def check(values):
    out = command.expand(values.out)
    if not out.suffix and out.exists():
        raise UserError(f"out must be a new folder, got {out}, which exists")
    out = command.output_path(values.out)
    check_picture(values, out)
    if not is_random(values):
        check_classes(values)
    settings.read_topic(settings.Sampling, arguments.sampling(values))
    known = fields.look(values.checkpoint)
    if values.vae:
        fields.check_vae(values.vae, known)
    if known:
        if not is_random(values):
            labels = find_labels(values, known.class_names, known.model.num_classes, warns=False)
            count_images(values, labels)
        check_format(values, out, known.settings.data.space)
        for options in read_grid(values):
            sampling = fields.check_options(known, arguments.sampling(values) | options)
        if values.calibrate is not None:
            diffusion = known.settings.diffusion
            fields.check_calibration(values.calibrate, sampling.num_steps, diffusion)


def check_picture(values, out):
    """UserError for an OUT that does not fit what it is to show."""
    if values.trajectory and values.grid:
        raise UserError("--trajectory must be given without --grid, got both")
    if values.calibrate is not None:
        check_calibration(values, out)
        return
    if values.trajectory:
        if out.suffix not in (".png", ".gif"):
            hint = "; MP4 needs an encoder: take a .gif" if out.suffix == ".mp4" else ""
            raise UserError(f"out must end with .png or .gif for --trajectory, got {out}{hint}")
    elif values.grid:
        option, _ = fields.read_sweep(values.grid, "grid", GRID)
        if values[option].present:
            raise UserError(f"--{option} must be left out with --grid={values.grid}, got both")
        if out.suffix != ".png":
            raise UserError(f"out must end with .png for --grid, got {out}")
        if values.columns:
            raise UserError(
                f"columns must be 0 for --grid, whose columns are the labels, got {values.columns}"
            )
    elif out.suffix not in (".png", ".npz", ""):
        raise UserError(f"out must end with .png or .npz, or be a new folder, got {out}")


def check_calibration(values, out):
    """UserError for flags that mean nothing for a calibration."""
    others = ("trajectory", "grid", "interpolate", "cache", "cache_guidance", "vae", "columns")
    if given := [name for name in others if values[name].present]:
        raise UserError(f"--{given[0]} must be left out with --calibrate, got both")
    if values["out"].present and out.suffix != ".json":
        raise UserError(f"out must end with .json for --calibrate, got {out}")


def is_random(values):
    """Whether the labels are left to a calibration."""
    return values.calibrate is not None and not any(values[name].value for name in CLASSES)


def check_classes(values):
    """UserError unless the classes are given once, in a form that can be read."""
    given = [name for name in CLASSES if values[name].value is not None]
    if len(given) != 1:
        rule = "--labels must be given, or --labels_file or --interpolate instead of it"
        raise UserError(f"{rule}, got {' and '.join(given) or 'none of them'}")
    if given != ["labels_file"]:
        labels_lib.split(values[given[0]].value)
    elif not command.expand(values.labels_file).is_file():
        raise UserError(f"labels_file must be a file that exists, got {values.labels_file}")
    else:
        labels_lib.read_lines(command.expand(values.labels_file))


def check_format(values, out, space):
    """UserError if the samples of a space cannot be written to the file out."""
    if space == "pixels" or values.vae or values.calibrate is not None:
        return
    if shown := _shown(values):
        raise UserError(f"--vae must be given to show latents with --{shown}")
    if out.suffix != ".npz":
        raise UserError(f"out must end with .npz for latents without a --vae, got {out}")


def read_grid(values):
    """The options of sampling of each row of --grid; [{}] without it, or for seeds."""
    if not values.grid:
        return [{}]
    option, found = fields.read_sweep(values.grid, "grid", GRID)
    return [{}] if option == "seed" else [{option: value} for value in found]


def _shown(values):
    """The flag whose picture compares images; None for samples."""
    return "trajectory" if values.trajectory else "grid" if values.grid else None


def find_labels(values, class_names, num_classes, **options):
    """The labels of the flags, each once; options: of `labels.parse`."""
    classes = class_names, num_classes
    if values.labels_file is not None:
        return labels_lib.read_file(command.expand(values.labels_file), *classes, **options)
    return labels_lib.parse(values.labels or values.interpolate, *classes, **options)


def count_images(values, labels):
    """How many images the flags ask for; UserError if these labels cannot be shown so."""
    if values.interpolate and len(labels) < 2:
        raise UserError(f"interpolate must be two classes or more, got {values.interpolate}")
    default = BETWEEN * (len(labels) - 1) + 1 if values.interpolate else len(labels)
    count = values.num_samples or default
    if (shown := _shown(values)) and count > MAX_SHOWN:
        raise UserError(f"labels must be at most {MAX_SHOWN} for --{shown}, got {count}")
    return count


def main(values):
    out = command.output_path(values.out)
    from dit_jax.machine import compiled  # imports jax

    compiled.keep()
    dit = dit_jax.load(
        values.checkpoint, weights=values.weights, vae=values.vae, vae_dtype=values.vae_dtype
    )
    if values.calibrate is not None:
        calibrate(values, dit, out)
        return
    labels, titles = read_labels(values, dit)
    check_format(values, out, dit.space)
    options = {"seed": values.seed, "batch_size": values.batch_size, "progress": True}
    draw = draw_comparison if _shown(values) else draw_samples
    draw(values, dit, labels, titles, out, **options, **arguments.sampling(values))
    what = _shown(values) or words.count(len(labels), "image")
    logging.info("%s of step %d: %s", what, dit.step, out)
    log_cost(values, dit)
    if not values.grid:
        logging.info("an image took %.3g s, without compilation", dit.seconds_per_image)


def calibrate(values, dit, out):
    """Prints a schedule for --cache, and writes it to a file if there is one."""
    from dit_jax.machine import disk
    from dit_jax.sampling import generate

    count = values.num_samples or RANDOM
    labels = generate.random_labels(values.seed, 0, count, dit.config.num_classes)
    if not is_random(values):
        labels, _ = read_labels(values, dit)
    options = {"seed": values.seed, "batch_size": values.batch_size, **arguments.sampling(values)}
    found = dit.calibrate(labels, values.calibrate, **options)
    changes = [round(float(change), 4) for change in found.changes]
    print("change of the first block from step to step:", *changes)
    print(f"threshold {found.threshold:.4g}")
    print(f"--cache={found.cache}")
    if values["out"].present:
        about = {"cache": found.cache, "threshold": found.threshold, "changes": changes}
        disk.write_text(out, json.dumps(about, indent=2) + "\n")


def log_cost(values, dit):
    """Logs what an image takes, for each row of --grid: network calls, FLOPs and memory."""
    for options in read_grid(values):
        sampling = arguments.sampling(values) | options
        calls, passes = dit.cost(**sampling)
        row = "".join(f" with {name} {value}" for name, value in options.items())
        found = (
            words.count(calls, "network call"),
            words.count(passes, "forward pass", "forward passes"),
        )
        logging.info("an image%s takes %s, %s", row, *found)
        size = dit.cache_bytes(**sampling)
        cache = f", and {words.size(size)} for its cache" if size else ""
        gflops = dit.flops(**sampling) / 1e9
        logging.info("an image%s takes %.4g GFLOPs%s", row, gflops, cache)


def read_labels(values, dit):
    """(labels, a list of numbers, or the weights of --interpolate; their titles) of the flags."""
    import numpy as np

    from dit_jax.sampling import arguments, figures, generate, pictures

    names, num_classes = dit.class_names, dit.config.num_classes
    found = find_labels(values, names, num_classes)
    count = count_images(values, found)
    arguments.check_room("num_samples", count, dit.config)
    if values.interpolate:
        weights = generate.interpolate(found, count, num_classes)
        return weights, figures.mixed_titles(found, count, names)
    labels = np.resize(found, count).tolist()
    return labels, pictures.class_titles(labels, names)


def draw_comparison(values, dit, labels, titles, out, **options):
    """Draws labels or weights as --trajectory or --grid wants it. options: of `dit.sample`."""
    from dit_jax.sampling import figures, pictures

    if values.grid:
        option, found = fields.read_sweep(values.grid, "grid", GRID)
        figures.grid(dit, labels, titles, option=option, values=found, **options).save(out)
    elif out.suffix == ".gif":
        pictures.write_gif(figures.animation(dit, labels, titles, **options), out)
    else:
        figures.strip(dit, labels, titles, columns=values.columns, **options).save(out)


def draw_samples(values, dit, labels, titles, out, **options):
    """Draws labels or weights, and writes them as a grid, an .npz or a folder."""
    import numpy as np

    from dit_jax.sampling import pictures

    images = dit.sample(labels, same_noise=bool(values.interpolate), **options)
    if out.suffix == ".npz":
        np.savez(out, images)
    elif not out.suffix:
        pictures.write_all(images, out)
    else:
        scale = pictures.grid_scale(images.shape[1:3])
        if values.interpolate:
            columns = values.columns or min(len(images), MIXED_COLUMNS)
            picture = pictures.grid(images, columns=columns, scale=scale, titles=titles)
        else:
            options = {"columns": values.columns, "scale": scale}
            picture = pictures.grid_of_classes(images, labels, dit.class_names, **options)
        picture.save(out)


def entry():
    options = {"required": ["checkpoint"], "words": ["checkpoint", "out"]}
    sys.exit(command.run("dit-sample", define, main, check=check, **options))


if __name__ == "__main__":
    entry()
