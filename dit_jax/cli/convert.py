"""Converts DiT checkpoints between JAX, the official PyTorch code and diffusers, with proof.

    dit-convert from-torch DiT-XL-2-256x256.pt runs/xl2        official .pt, .safetensors, SiT's too
    dit-convert to-torch runs/digits digits.pt                 for the official sample.py --ckpt
    dit-convert to-torch runs/digits digits_torch --bundle     samples with PyTorch alone
    dit-convert from-diffusers DiT-XL-2-256 runs/xl2           a folder of diffusers' DiTPipeline
    dit-convert to-diffusers runs/xl2 xl2-pipeline --vae=DIR
    dit-convert vae sd-vae-ft-ema runs/vae                     diffusers' autoencoder, or its file
    dit-convert inspect FILE_OR_DIR                            what is this?

Every conversion runs both sides on the same inputs, prints how far they are apart and writes it to
parity.json, with the sha256 of every file. Exit code 1: they are further apart than they should be.
"""

import ctypes.util
import importlib.util
import json
import signal
import sys
import time
from pathlib import Path

from absl import flags, logging

from dit_jax.cli import command
from dit_jax.convert import (
    bundle,
    describe,
    diffusers_dit,
    files,
    native,
    parity,
    torch_dit,
    torch_vae,
)
from dit_jax.errors import UserError
from dit_jax.sampling import autoencoder


def define(values):
    options = {"flag_values": values}
    flags.DEFINE_boolean(
        "overwrite", False, "Replace a file, or a folder that dit-convert made.", **options
    )
    flags.DEFINE_enum(
        "weights",
        "ema",
        ["ema", "model", "params"],
        "The average, or the plain parameters: model in a .pt, params in a run.",
        **options,
    )
    flags.DEFINE_boolean("bundle", False, "to-torch: a folder that stands alone.", **options)
    flags.DEFINE_string("vae", None, "to-diffusers: the folder of an AutoencoderKL.", **options)
    flags.DEFINE_string(
        "from_hub",
        None,
        "vae: download it, as stabilityai/sd-vae-ft-ema; then OUT alone.",
        **options,
    )
    flags.DEFINE_integer(
        "num_heads",
        None,
        "from-torch, inspect: heads, where the size is none of the paper's.",
        lower_bound=1,
        **options,
    )
    flags.DEFINE_integer(
        "num_classes",
        None,
        "from-torch, inspect: classes, where the label table has no row for the null label.",
        lower_bound=1,
        **options,
    )
    flags.DEFINE_enum(
        "space", "latents", ["latents", "pixels"], "from-*: what it was trained on.", **options
    )
    flags.DEFINE_enum(
        "schedule", "linear", ["linear", "squared_cosine"], "from-torch: of its noise.", **options
    )


def main(values, *words):
    word, *paths = words or ("",)
    if word not in COMMANDS:
        raise UserError(f"command must be one of {', '.join(COMMANDS)}, got {word!r}")
    convert, names, takes = COMMANDS[word]
    if values.from_hub:  # instead of the first of them
        names = names[1:]
    if len(paths) != len(names):
        raise UserError(f"{word} takes {' '.join(names)}, got {' '.join(paths)!r}")
    for name, path in zip(names, paths, strict=True):
        if not path:
            raise UserError(f"{name} must not be empty")
    for name in values:
        if values[name].present and name not in takes:
            have = ", ".join(f"--{name}" for name in takes)
            raise UserError(f"{word} takes {have}, got --{name}")
    _give_memory_back()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that nothing is left aside
    return convert(values, *(str(command.expand(path)) for path in paths))


def from_torch(values, source, out):
    _check_file(source)
    files.check_folder(out)

    def convert(aside):
        if values["weights"].present and not files.groups(source):
            raise UserError(f"weights can be chosen of a file with ema and model, got {source}")
        logging.info("reading %s, %.0f MB", source, Path(source).stat().st_size / 1e6)
        state_dict = files.read_state_dict(source, values.weights)
        model, settings = _read_settings(values, source, state_dict)
        _write_native(aside, state_dict, model, settings, out)
        return _compare(parity.official(source, model, values.weights), parity.ours(aside), model)

    return _convert(values, source, out, convert)


def from_diffusers(values, source, out):
    files.check_folder(out)

    def convert(aside):
        logging.info("reading %s", source)
        state_dict, model, settings = diffusers_dit.read_folder(source, space=values.space)
        logging.info("the folder does not tell: taken for %s (--space)", values.space)
        _write_native(aside, state_dict, model, settings, out)
        sides = [parity.diffusers(source), parity.ours(aside)]
        return _compare(*sides, model, plain=parity.diffusers(source, plain=True))

    return _convert(values, source, out, convert)


def to_torch(values, source, out):
    if values.bundle:
        files.check_folder(out)
    elif not Path(out).suffix:
        raise UserError(
            f"OUT must end with {', '.join(files.SUFFIXES)} or be a --bundle, got {out}"
        )
    else:
        files.check_suffix(out)

    def convert(aside):
        model, settings, state_dict = _read_native(source, values.weights)
        logging.info("writing %s", out)
        if values.bundle:
            bundle.write(aside, state_dict, model, settings)
        else:
            files.write_state_dict(aside, state_dict)
        state_dict.clear()
        weights = aside / "model.safetensors" if values.bundle else aside
        one, two = parity.ours(source, values.weights), parity.official(weights, model)
        return _compare(one, two, model)

    return _convert(values, native.step_folder(source), out, convert, folder=values.bundle)


def to_diffusers(values, source, out):
    files.check_folder(out)
    model, settings, *_ = native.describe(source)
    diffusers_dit.check(model)
    vae = values.vae and command.expand(values.vae)
    if vae:
        diffusers_dit.check_vae(vae, model)

    def convert(aside):
        _, _, state_dict = _read_native(source, values.weights)
        logging.info("writing %s", out)
        diffusers_dit.write_folder(aside, state_dict, model, settings, vae)
        sides = [parity.ours(source, values.weights), parity.diffusers(aside)]
        return _compare(*sides, model, plain=parity.diffusers(aside, plain=True))

    code = _convert(values, native.step_folder(source), out, convert)
    if settings["data"]["space"] == "pixels":
        logging.info("a model of pixels: DiTPipeline decodes latents, and cannot draw it")
    elif not vae:
        logging.info("no VAE in it: DiTPipeline.from_pretrained(%r, vae=...) needs one", out)
    return code


def convert_vae(values, *paths):
    *source, out = paths
    files.check_folder(out)
    source = source[0] if source else torch_vae.download(values.from_hub)

    def convert(aside):
        logging.info("reading %s", source)
        config, state_dict = torch_vae.read(source)
        if not torch_vae.config_path(source).is_file():
            message = "no config.json: taken as Stable Diffusion's, groups of norms %d, scale %s"
            logging.warning(message, config.num_groups, config.scale)
        logging.info("writing %s, latents less %s, times %s", out, config.shift, config.scale)
        autoencoder.save(aside, config, torch_vae.from_torch(state_dict, config))
        if importlib.util.find_spec("diffusers") is None:
            return {"passed": None}
        return parity.autoencoders(source, aside)

    return _convert(values, source, out, convert)


def inspect(values, source):
    """Prints what a checkpoint is: format, variant, shapes, step, EMA or not."""
    for name, value in describe.describe(source, **_known(values)).items():
        print(f"{name:16s} {value}")


READING = ("num_heads", "num_classes")
TOLD = ("space", "schedule")
COMMANDS = {  # what it does, the words and the flags that it takes
    "from-torch": (
        from_torch,
        ("FILE", "OUT"),
        ("overwrite", "weights", *READING, *TOLD),
    ),
    "to-torch": (to_torch, ("CHECKPOINT", "OUT"), ("overwrite", "weights", "bundle")),
    "from-diffusers": (from_diffusers, ("DIR", "OUT"), ("overwrite", "space")),
    "to-diffusers": (to_diffusers, ("CHECKPOINT", "OUTDIR"), ("overwrite", "weights", "vae")),
    "vae": (convert_vae, ("DIR_OR_FILE", "OUT"), ("overwrite", "from_hub")),
    "inspect": (inspect, ("FILE_OR_DIR",), READING),
}


def _give_memory_back():
    """Makes glibc return freed memory: it keeps blocks of up to 32 MB, all of a DiT's."""
    libc = ctypes.util.find_library("c")
    if libc and hasattr(ctypes.CDLL(libc), "mallopt"):
        ctypes.CDLL(libc).mallopt(-3, 2**20)  # M_MMAP_THRESHOLD, in bytes


def _check_file(source):
    path = Path(source)
    if path.is_dir():
        inside = path / "model.safetensors"
        hint = f"; {inside} is one" if inside.is_file() else ""
        if diffusers_dit.is_folder(path):
            hint = "; from-diffusers takes it"
        elif native.kind(path) == "model":
            hint = "; to-torch and to-diffusers take it"
        raise UserError(f"FILE must be a file, got the folder {source}{hint}")
    if not path.is_file():
        raise UserError(f"FILE must be a file that exists, got {source}")


def _known(values):
    return {"num_heads": values.num_heads or 0, "num_classes": values.num_classes or 0}


def _read_settings(values, source, state_dict):
    """(DiTConfig, settings) of an official state dict; those of a bundle are beside it."""
    if bundle.is_weights(source) and not any(values[name].present for name in (*READING, *TOLD)):
        logging.info("the config.json beside it tells how to sample it")
        return bundle.read_config(Path(source).parent)
    model = torch_dit.read_config(state_dict, **_known(values))
    logging.info(
        "weights do not tell: taken for %d heads (--num_heads), %d classes%s (--num_classes), "
        "%s (--space), noise %s (--schedule)",
        *(model.num_heads, model.num_classes, " and a null label" if model.null_label else ""),
        *(values.space, values.schedule),
    )
    return model, native.settings_of(model, space=values.space, schedule=values.schedule)


def _read_native(source, weights):
    """(DiTConfig, settings, official state dict) of one of our checkpoints."""
    logging.info("reading %s", source)
    model, settings, params = native.read(source, weights)
    return model, settings, torch_dit.to_official(params, model)


def _write_native(aside, state_dict, model, settings, out):
    what = (out, describe.variant(model), model.conditioning)
    logging.info("writing %s, a DiT of %s, %s", *what)
    params = torch_dit.from_official(state_dict, model)
    native.write(aside, model, settings, params)


def _compare(one, two, model, *, plain=None):
    """The report of both sides on the same inputs. plain: the side of diffusers as it is."""
    if importlib.util.find_spec("torch") is None:
        return {"passed": None}
    started = time.perf_counter()
    inputs = parity.inputs(model)
    expected = one(*inputs)
    report = parity.measure(expected, two(*inputs))
    if plain:
        report["plain_diffusers"] = parity.measure(expected, plain(*inputs))["relative"]
    logging.info("compared in %.1f s", time.perf_counter() - started)
    return report


def _convert(values, source, out, convert, *, folder=True):
    """Writes out by convert(place) -> report, aside and then in its place; the exit code."""
    out, options = Path(out), {"folder": folder, "overwrite": values.overwrite}
    with files.written_aside(out, source=source, **options) as aside:
        report = convert(aside)
        report["files"] = {"from": files.digests(source), "to": files.digests(aside)}
        place = aside / "parity.json" if folder else files.report_of(aside)
        place.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n")
        fate = f"{out} is written all the same, to be looked at"
        if report["passed"] is False and out.exists():
            files.discard(aside)
            fate = f"{out} is as it was"
    return _tell(report, out / "parity.json" if folder else files.report_of(out), fate)


def _tell(report, place, fate):
    """Prints a report that lies at `place`; the exit code. fate: of an output that differs."""
    if report["passed"] is None:
        print(
            "not checked: PyTorch or diffusers is missing. "
            "pip install dit_jax[convert], then convert again"
        )
        return 0
    print(parity.table(report))
    if "plain_diffusers" in report:
        deviation = parity.text(report["plain_diffusers"])
        print(f"plain diffusers is {deviation} off: see match_official in the README")
    apart = f"{parity.text(report['relative'])} of the largest output"
    if report["passed"]:
        print(f"the same to {apart}; the report is {place}")
        return 0
    print(f"not the same: {apart} apart, more than {report['tolerance']:.0e}; {fate}")
    return 1


def entry():
    sys.exit(command.run("dit-convert", define, main, takes=None, tidies=True))


if __name__ == "__main__":
    entry()
