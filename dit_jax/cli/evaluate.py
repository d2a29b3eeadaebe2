"""Judges samples: of a model, of a folder of images, or of an .npz. Every score gets a receipt.

    dit-evaluate runs/digits
    dit-evaluate runs/fashion runs/fashion/evaluation --num_samples=5000
    dit-evaluate runs/xl2 runs/fid --inception=runs/inception --preset=paper-256 \\
        --reference=VIRTUAL_imagenet256_labeled.npz --vae=runs/vae
    dit-evaluate samples.npz runs/fid --inception=runs/inception --reference=REFERENCE.npz
    dit-evaluate data/imagenet reference.npz --make_reference --size=256 --inception=runs/inception
    dit-evaluate --repeat=runs/fid/receipt.json runs/again
    dit-evaluate --compare runs/fid runs/again
    dit-evaluate --sweep=cfg_scale=1,1.5,2,4 --out=runs/sweep runs/fashion runs/other
    dit-evaluate --sweep=ema_width=0.05,0.1,0.15 --out=runs/sweep runs/fashion
    dit-evaluate --sweep=sampler=ddpm,ddim --sweep=num_steps=10,20,50 --out=runs/sweep runs/fashion
    dit-evaluate --sweep=cache=none,every:2,every:3 --timed --out=runs/sweep runs/fashion
    dit-evaluate --study=runs/scaling --out=runs/scaling/plots

CHECKPOINT is what is judged, and OUT a folder; they can also be given as --checkpoint and --out.
With --inception, from `dit-convert inception`, the scores are those of papers: FID, sFID, Inception
Score, precision, recall, KID. Without it, a small classifier of the run's own data looks at the
samples, and the distance is called by that name. A model of digits without further flags is judged
as in the README, into a JSON file: judgments.json in the run, or OUT.

OUT holds receipt.json and the features of all images. A killed evaluation goes on where it was.
dit_jax/evals/README.md defines the scores.
"""

import itertools
import sys

from absl import flags

from dit_jax.checkpoint import peek, steps
from dit_jax.cli import arguments, command
from dit_jax.errors import UserError
from dit_jax.evals import receipt, request
from dit_jax.machine import disk
from dit_jax.sampling import fields

SWEPT = fields.SWEPT | {"ema_width": float}  # what --sweep varies
MANY = {"--compare", "--sweep"}  # flags with which every word is one of several inputs
OF_REFERENCES = ("size", "split")
MODES = {  # the other flags that mean something with each of these
    "compare": (),
    "sweep": (*request.FLAGS, *arguments.SAMPLING, "out", "timed"),
    "study": ("out", "reference"),
    "repeat": ("checkpoint", "out"),
    "make_reference": ("checkpoint", "out", "inception", *OF_REFERENCES),
}


def define(values):
    options = {"flag_values": values}
    text = "A run, a checkpoint, a folder of images, or an .npz with arr_0."
    flags.DEFINE_string("checkpoint", None, text, **options)
    flags.DEFINE_string("out", None, "A folder; default: evaluation in the run.", **options)
    text = "Inception, from dit-convert inception; default: a classifier of the run's data."
    flags.DEFINE_string("inception", None, text, **options)
    text = (
        "An .npz of ADM's format; default, without --inception: the run's own data. With --study: "
    )
    text += "the design with which the others are compared; default: the one of default values."
    flags.DEFINE_string("reference", None, text, **options)
    text = "Settings of a table of the paper: paper-256, paper-256-nocfg, paper-512, scaling-400k."
    flags.DEFINE_string("preset", None, text, **options)
    text = "How many; default: 50,000 with a preset, else 1,000, or all images that exist."
    bounds = {"lower_bound": request.FEWEST, "upper_bound": request.MOST}
    flags.DEFINE_integer("num_samples", None, text, **bounds, **options)
    flags.DEFINE_enum("weights", "ema", ["ema", "params"], "EMA or plain parameters.", **options)
    command.define_seed(values)
    flags.DEFINE_string("vae", None, "The autoencoder that decodes latents.", **options)
    flags.DEFINE_enum(
        "vae_dtype", "float32", ["float32", "bfloat16"], "Arithmetic of the vae.", **options
    )
    arguments.define_sampling(values)
    flags.DEFINE_integer(
        "batch_size", 500, "Images at a time, for digits.", lower_bound=1, **options
    )
    text = "Resamples for deviations; default: 20, but none for FID, of which each takes 30 s."
    bounds = {"lower_bound": 0, "upper_bound": request.MOST_RESAMPLES}
    flags.DEFINE_integer("bootstrap", None, text, **bounds, **options)
    flags.DEFINE_boolean("fid_infinity", False, "Extrapolate FID to infinitely many.", **options)
    flags.DEFINE_boolean("make_reference", False, "Write OUT.npz from prepared data.", **options)
    command.define_size(values, None, "Of its images, in pixels.")
    flags.DEFINE_string("split", "train", "Of the prepared data.", **options)
    flags.DEFINE_string("repeat", None, "A receipt: judge again and compare.", **options)
    flags.DEFINE_boolean("compare", False, "Print receipts side by side.", **options)
    text = "OPTION=VALUE,...: judge with each value, and plot; given twice: with every pair."
    flags.DEFINE_multi_string("sweep", None, text, **options)
    text = "With --sweep: also time the sampling with each value, in turn, and plot."
    flags.DEFINE_boolean("timed", False, text, **options)
    text = "A folder of runs with scores/STEP: compare models, objectives or optimizers; plot."
    flags.DEFINE_string("study", None, text, **options)
    command.define_cluster(values)


def check(values, *inputs):
    _check_flags(values)
    if values.compare:
        if len(inputs) < 2:
            raise UserError(f"--compare takes two receipts or more, got {len(inputs)}")
        if len(set(inputs)) < len(inputs):
            raise UserError(f"--compare must be given each receipt once, got {', '.join(inputs)}")
        for path in inputs:
            receipt.read(path)
    elif values.sweep:
        _check_sweep(values, inputs)
    elif values.study:
        command.check_exists("study", values.study)
        command.output_folder(_require(values, "out", "--study"))
    elif values.repeat:
        new_folder(values)
        request.Request.from_receipt(receipt.read(values.repeat), values.repeat).check()
    elif values.make_reference:
        for name in ("checkpoint", "out", "inception", "size"):
            _require(values, name, "--make_reference")
        command.check_exists("checkpoint", values.checkpoint)
        peek.meta_of(values.inception, of="inception", name="inception")
        _check_reference(values)
    else:
        if not values.checkpoint:
            raise UserError("--checkpoint must be given")
        asked = read_request(values, values.checkpoint)
        asked.check()
        out = disk.path(folder(values))
        if not asked.is_plain:
            _check_batch_size(values)
            score_folder(out, asked.samples)
        elif disk.is_on_disk(out):
            disk.check_writable(out, "out")


def _check_flags(values):
    """UserError for a flag that means nothing beside the others."""
    given = [name for name in values if values[name].present]
    modes = [name for name in MODES if values[name].value]
    if not modes:
        if wrong := [name for name in given if name in OF_REFERENCES]:
            raise UserError(f"--{wrong[0]} must be given with --make_reference only")
        if "timed" in given:
            raise UserError("--timed must be given with --sweep only")
        return
    allowed = {modes[0], *MODES[modes[0]], *command.CLUSTER}
    if values["sweep"].present > 2:
        count = values["sweep"].present
        raise UserError(f"--sweep must be given once or twice, got it {count} times")
    if wrong := [name for name in given if name not in allowed]:
        raise UserError(f"--{wrong[0]} must not be given with --{modes[0]}")


def _check_reference(values):
    """UserError for data that were not prepared, or for an OUT that was written otherwise."""
    from dit_jax.data import prepared  # needs NumPy and Pillow
    from dit_jax.evals import samples

    prepared.open_images(command.expand(values.checkpoint), values.split, values.size)
    out = command.output_path(values.out, ".npz")
    if out.exists() and "identity" not in samples.names_in(out):
        raise UserError(f"out must be new or what --make_reference wrote, got {out}")


def _check_batch_size(values):
    if values["batch_size"].present:
        raise UserError("--batch_size must be given for the judgments of digits only")


def _check_sweep(values, inputs):
    swept = read_sweeps(values)
    command.output_folder(_require(values, "out", "--sweep"))
    if not inputs:
        raise UserError("--sweep takes one run or more, got none")
    for name, text in zip(swept[0], values.sweep, strict=True):
        if name in arguments.sampling(values):
            raise UserError(f"--{name} must be left out with --sweep={text}, got both")
    for path in inputs:
        for chosen in swept:
            sampling = {name: value for name, value in chosen.items() if name != "ema_width"}
            read_request(values, path, sampling).check()
        if "ema_width" in swept[0]:
            from dit_jax.runs import snapshots  # needs NumPy

            if values.weights != "ema":
                raise UserError(
                    f"--weights must be ema with --sweep=ema_width, got {values.weights}"
                )
            snapshots.check(path, list(dict.fromkeys(each["ema_width"] for each in swept)))
    if not values.inception:
        _check_alike(inputs)


def _check_alike(paths):
    """UserError for runs of other data, as their own classifiers give scores that differ."""
    found = {}
    for path in paths:
        if known := fields.look(path):
            data, size = known.settings.data, tuple(known.model.input_size)
            other = found.setdefault((data.source, data.classes, size), path)
            if len(found) > 1:
                first = next(iter(found.values()))
                raise UserError(
                    f"--sweep without --inception must be over runs of the same data, got {first} "
                    f"and {other}"
                )


def _require(values, name, flag):
    if not values[name].value:
        raise UserError(f"--{name} must be given with {flag}")
    return values[name].value


def read_sweeps(values):
    """[{option: value}] of --sweep: a dict for each value, or for each pair of values of two."""
    swept = {}
    for text in values.sweep:
        name, given = fields.read_sweep(text, kinds=SWEPT)
        if name in swept:
            raise UserError(f"--sweep must be over two different options, got {name} twice")
        swept[name] = given
    return [dict(zip(swept, chosen, strict=True)) for chosen in itertools.product(*swept.values())]


def read_request(values, path, swept=()):
    """The Request of the flags for a path; swept: {option: value} of a sweep."""
    given = {name: values[name].value for name in request.FLAGS if values[name].value is not None}
    sampling = arguments.sampling(values) | dict(swept)
    return request.Request(samples=str(path), sampling=sampling, **given)


def new_folder(values):
    """The folder of --repeat, which is the only word or --out."""
    out = values.out or values.checkpoint
    if not out:
        raise UserError("--out must be given with --repeat: a new folder")
    if values.out and values.checkpoint:
        raise UserError(f"--repeat takes one new folder, got {values.checkpoint} and {values.out}")
    out = score_folder(out)
    if (out / "receipt.json").exists():
        raise UserError(f"out must be a new folder, got {out}, which has a receipt")
    return out


def score_folder(text, samples=None):
    """The Path of OUT; UserError if it is a run, a checkpoint or the folder of the samples."""
    out = command.output_folder(text)
    if steps.are_in(out) or (samples and disk.absolute(out) == disk.absolute(samples)):
        raise UserError(f"out must not be a run, a checkpoint or the images, got {out}")
    return out


def folder(values):
    return values.out or str(request.home(values.checkpoint) / "evaluation")


def main(values, *inputs):
    if not (values.compare or values.study):
        from dit_jax.machine import compiled  # imports jax

        compiled.keep()
    if values.compare:
        print(receipt.compare({str(path): receipt.read(path) for path in inputs}))
    elif values.sweep:
        from dit_jax.runs import sweeps

        asked, out = read_request(values, inputs[0]), command.output_folder(values.out)
        sweeps.run(asked, inputs, read_sweeps(values), out, sys.argv, timed=values.timed)
    elif values.study:
        from dit_jax.runs import study

        workdir, out = command.expand(values.study), command.output_folder(values.out)
        print(study.report(workdir, out, reference=values.reference))
    elif values.repeat:
        return repeat(values)
    elif values.make_reference:
        from dit_jax.runs import evaluate

        options = {"split": values.split, "size": values.size, "inception": values.inception}
        data, out = command.expand(values.checkpoint), command.output_path(values.out)
        evaluate.make_reference(data, out, **options)
    else:
        from dit_jax.runs import evaluate, judge_digits

        asked = read_request(values, values.checkpoint)
        if judge_digits.fits(asked):
            out = disk.path(values.out or request.home(asked.samples) / "judgments.json")
            if disk.is_on_disk(out):
                command.output_path(out, ".json")
            elif out.suffix != ".json":
                raise UserError(f"out must end with .json, got {out}")
            judge_digits.run(asked, out, values.batch_size)
        else:
            _check_batch_size(values)
            evaluate.run(asked, score_folder(folder(values), asked.samples), sys.argv)
    return 0


def repeat(values):
    from dit_jax.runs import evaluate

    old = receipt.read(values.repeat)
    asked = request.Request.from_receipt(old, values.repeat)
    new = evaluate.run(asked, new_folder(values), sys.argv)
    if new is None:  # on another process
        return 0
    text, repeated = receipt.check_repeated(old, new)
    print(text)
    return 0 if repeated else 1


def entry():
    many = any(word.partition("=")[0] in MANY for word in sys.argv[1:])
    options = {"takes": None} if many else {"words": ["checkpoint", "out"]}
    sys.exit(command.run("dit-evaluate", define, main, check=check, **options))


if __name__ == "__main__":
    entry()
