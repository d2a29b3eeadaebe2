"""Converts DiT checkpoints between JAX, the official PyTorch code and diffusers, and checks them.

    dit-convert from-torch DiT-XL-2-256x256.pt runs/xl2 --class_names=imagenet   official file
    dit-convert to-torch runs/xl2 xl2.pt                       for the official sample.py --ckpt
    dit-convert to-torch runs/digits digits_torch --bundle     a folder that samples in PyTorch
    dit-convert from-diffusers DiT-XL-2-256 runs/xl2           a folder of diffusers' DiTPipeline
    dit-convert to-diffusers runs/xl2 xl2-pipeline --vae=DIR
    dit-convert vae sd-vae-ft-ema runs/vae                     autoencoder: diffusers' folder, file
    dit-convert inception FILE runs/inception                  the weights file of pytorch-fid
    dit-convert card runs/digits README.md                     a model card
    dit-convert push runs/digits alice/digits                  to the Hugging Face hub, with a card
    dit-convert pull alice/digits runs/digits                  what push wrote
    dit-convert inspect FILE_OR_DIR                            prints format, shapes, settings

Every conversion is followed by a parity check. It runs both sides on the same inputs, prints the
errors and writes them to parity.json with the sha256 of every file. Exit code 1: an error exceeds
its tolerance. push needs a token of the hub: HF_TOKEN, or `hf auth login`.
dit_jax/convert/README.md explains everything.
"""

import re
import sys

from absl import flags

from dit_jax.checkpoint import steps
from dit_jax.cli import command, interrupt
from dit_jax.errors import UserError

SHAPE_FLAGS = ("num_heads", "num_classes")
CARD_FLAGS = ("scores", "license", "dataset")
IMAGENET = "imagenet"  # --class_names without a file
LICENCE = "[a-z0-9.+-]+"  # identifiers of the hub
COMMANDS = {  # name: (arguments, allowed flags); convert/commands.py has their functions
    "from-torch": (
        ("FILE", "OUT"),
        ("overwrite", "weights", *SHAPE_FLAGS, "space", "schedule", "prediction", "class_names"),
    ),
    "to-torch": (("CHECKPOINT", "OUT"), ("overwrite", "weights", "bundle")),
    "from-diffusers": (("DIR", "OUT"), ("overwrite", "space", "class_names")),
    "to-diffusers": (("CHECKPOINT", "OUTDIR"), ("overwrite", "weights", "vae")),
    "vae": (("DIR_OR_FILE", "OUT"), ("overwrite", "from_hub")),
    "inception": (("FILE", "OUT"), ("overwrite", "other_weights")),
    "card": (("CHECKPOINT", "OUT"), ("overwrite", "weights", *CARD_FLAGS, "repo")),
    "push": (
        ("CHECKPOINT", "REPO"),
        ("overwrite", "weights", *CARD_FLAGS, "card", "private", "revision"),
    ),
    "pull": (("REPO", "OUT"), ("overwrite", "revision")),
    "inspect": (("FILE_OR_DIR",), SHAPE_FLAGS),
}


def define(values):
    options = {"flag_values": values}
    flags.DEFINE_boolean(
        "overwrite", False, "Replace a file, or a folder that dit-convert wrote.", **options
    )
    flags.DEFINE_enum(
        "weights",
        "ema",
        ["ema", "model", "params"],
        "ema; or the trained parameters, called model in a .pt and params in a run.",
        **options,
    )
    flags.DEFINE_boolean("bundle", False, "to-torch: write a bundle.", **options)
    flags.DEFINE_boolean("other_weights", False, "inception: accept another sha256.", **options)
    flags.DEFINE_string("vae", None, "to-diffusers: AutoencoderKL folder to include.", **options)
    flags.DEFINE_string(
        "from_hub",
        None,
        "vae: download this autoencoder, e.g. stabilityai/sd-vae-ft-ema; only OUT remains.",
        **options,
    )
    flags.DEFINE_integer(
        "num_heads",
        None,
        "from-torch, inspect: number of heads, if the size is not in the paper.",
        lower_bound=1,
        **options,
    )
    flags.DEFINE_integer(
        "num_classes",
        None,
        "from-torch, inspect: number of classes, if the label table has no null label.",
        lower_bound=1,
        **options,
    )
    flags.DEFINE_enum(
        "space",
        "latents",
        ["latents", "pixels"],
        "from-*: what the model was trained on.",
        **options,
    )
    flags.DEFINE_enum(
        "schedule",
        "linear",
        ["linear", "squared_cosine"],
        "from-torch: the noise schedule of the training.",
        **options,
    )
    flags.DEFINE_enum(
        "prediction",
        None,
        ["noise", "velocity"],
        "from-torch: what the model predicts: velocity for SiT. Default: what the file says.",
        **options,
    )
    text = "from-*: imagenet, or a text file with the name of label 0, 1, ... on its lines."
    flags.DEFINE_string("class_names", None, text, **options)
    _define_sharing(options)


def _define_sharing(options):
    """Defines the flags of card, push and pull."""
    text = "card, push: a receipt of dit-evaluate; may be repeated. Default: those in the run."
    flags.DEFINE_multi_string("scores", None, text, **options)
    text = "card, push: licence of the weights, as the hub names it: mit, cc-by-nc-4.0."
    flags.DEFINE_string("license", None, text, **options)
    text = "card, push: the hub's name of the training data; may be repeated."
    flags.DEFINE_multi_string("dataset", None, text, **options)
    flags.DEFINE_string("repo", None, "card: NAMESPACE/NAME of the model on the hub.", **options)
    flags.DEFINE_string("card", None, "push: a file to take as the card.", **options)
    flags.DEFINE_boolean("private", False, "push: to a private repository.", **options)
    text = "push: the branch; pull: a branch, tag or commit. Default: main."
    flags.DEFINE_string("revision", None, text, **options)


def check(values, *words):
    name, *paths = words or ("",)
    if name not in COMMANDS:
        raise UserError(f"command must be one of {', '.join(COMMANDS)}, got {name!r}")
    arguments, allowed = COMMANDS[name]
    if values.from_hub:  # replaces the first argument
        arguments = arguments[1:]
    if len(paths) != len(arguments):
        raise UserError(f"{name} takes {' '.join(arguments)}, got {' '.join(paths)!r}")
    for argument, path in zip(arguments, paths, strict=True):
        if not path:
            raise UserError(f"{argument} must not be empty")
    for flag in values:
        if values[flag].present and flag not in allowed:
            rule = ", ".join(f"--{flag}" for flag in allowed)
            raise UserError(f"{name} takes {rule}, got --{flag}")
    if name in ("card", "push", "pull"):
        return _check_sharing(name, values, *paths)
    paths = [command.expand(path) for path in paths]
    if name in ("to-torch", "to-diffusers"):
        directory, step = steps.locate(paths[0])
        source = directory / str(step)
    else:
        source = None if values.from_hub else paths[0]
    names = None if values.class_names == IMAGENET else values.class_names
    for argument, path in (arguments[0], source), ("vae", values.vae), ("class_names", names):
        if path and name != "inception":  # which says where its file can be had
            command.check_exists(argument, path)
    if name != "inspect":
        from dit_jax.convert import files  # needs NumPy

        files.check(name, source, paths[-1], values)
        if name == "from-torch" and source.is_file():
            files.parts(source)


def _check_sharing(name, values, source, target):
    """UserError if card, push or pull cannot work, as far as no network tells."""
    from dit_jax.convert import files, hub, receipts  # need NumPy

    repository = {"card": values.repo, "push": target, "pull": source}[name]
    if repository:
        hub.check_name(repository)
    if name == "pull":
        out = command.expand(target)
        files.check_folder(out)
        files.check_output(out, source=None, folder=True, overwrite=values.overwrite)
        return
    steps.locate(source)
    files.check_weights(values.weights)
    for path in values.scores or ():
        receipts.read(path)
    if values.license and not re.fullmatch(LICENCE, values.license):
        raise UserError(f"license must be a name of the hub, as mit, got {values.license!r}")
    for text in values.dataset or ():
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", text):
            raise UserError(f"dataset must be NAMESPACE/NAME on the hub, got {text!r}")
    if name == "card":
        out = command.output_path(target, ".md")
        if out.exists() and not values.overwrite:
            raise UserError(f"output must not exist unless --overwrite is given, got {out}")
        return
    if values.card:
        path = command.expand(values.card)
        if not path.is_file():
            raise UserError(f"card must be a file that exists, got {path}")
        hub.check_card(path)
        for flag in ("license", "dataset"):
            if values[flag].present:
                raise UserError(f"{flag} must not be given with --card, which says it")
    hub.check_token()


def main(values, name, *paths):
    paths = [str(command.expand(path)) for path in paths]
    for flag in ("vae", "card", "class_names"):
        if values[flag].value and values[flag].value != IMAGENET:
            values[flag].value = str(command.expand(values[flag].value))
    from dit_jax.convert import commands, files

    commands.return_freed_memory()
    interrupt.clean_at_the_end(files.remove_unfinished)
    return getattr(commands, name.replace("-", "_"))(values, *paths)


def entry():
    sys.exit(command.run("dit-convert", define, main, check=check, takes=None))


if __name__ == "__main__":
    entry()
