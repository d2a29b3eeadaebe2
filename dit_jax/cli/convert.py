"""Converts DiT checkpoints between JAX, the official PyTorch code and diffusers, with proof.

    dit-convert from-torch DiT-XL-2-256x256.pt runs/xl2        official .pt, .safetensors, SiT's too
    dit-convert to-torch runs/digits digits.pt                 for the official sample.py --ckpt
    dit-convert to-torch runs/digits digits_torch --bundle     samples with PyTorch alone
    dit-convert from-diffusers DiT-XL-2-256 runs/xl2           a folder of diffusers' DiTPipeline
    dit-convert to-diffusers runs/xl2 xl2-pipeline --vae=DIR
    dit-convert inspect FILE_OR_DIR                            what is this?

Every conversion runs both sides on the same inputs, prints how far they are apart and writes it to
parity.json, with the sha256 of every file. Exit code 1: they are further apart than they should be.
"""

import ctypes.util
import importlib.util
import json
import sys
import time
from pathlib import Path

import jax
from absl import flags, logging

from dit_jax.cli import command
from dit_jax.convert import bundle, diffusers_dit, files, native, parity, torch_dit
from dit_jax.models import dit


def define(values):
    options = {"flag_values": values}
    flags.DEFINE_boolean(
        "overwrite", False, "Replace a file, or a folder that dit-convert made.", **options
    )
    flags.DEFINE_enum(
        "weights", "ema", ["ema", "model", "params"], "Averaged parameters or plain.", **options
    )
    flags.DEFINE_boolean("bundle", False, "to-torch: a folder that stands alone.", **options)
    flags.DEFINE_string("vae", None, "to-diffusers: the folder of an AutoencoderKL.", **options)
    flags.DEFINE_integer(
        "num_heads", 0, "from-torch: heads, where the size is none of the paper's.", **options
    )
    flags.DEFINE_integer(
        "num_classes", 0, "from-torch: classes; 0: the label table less the null label.", **options
    )
    flags.DEFINE_enum(
        "space", "latents", ["latents", "pixels"], "from-torch: what it was trained on.", **options
    )
    flags.DEFINE_enum(
        "schedule", "linear", ["linear", "squared_cosine"], "from-torch: of its noise.", **options
    )


def main(values, *words):
    word, *paths = words or ("",)
    if word not in COMMANDS:
        raise ValueError(f"command must be one of {', '.join(COMMANDS)}, got {word!r}")
    convert, names = COMMANDS[word]
    if len(paths) != len(names):
        raise ValueError(f"{word} takes {' '.join(names)}, got {' '.join(paths)!r}")
    _give_memory_back()
    return convert(values, *paths)


def from_torch(values, source, out):
    _check_file(source)
    with files.written_aside(out, overwrite=values.overwrite) as aside:
        state_dict = _read(source, values.weights)
        model = _read_config(values, state_dict)
        settings = native.settings_of(model, space=values.space, schedule=values.schedule)
        _write_native(aside, state_dict, model, settings)
        one = parity.official(source, model, values.weights)
        return _prove(one, parity.ours(aside), model, source, aside)


def from_diffusers(values, source, out):
    with files.written_aside(out, overwrite=values.overwrite) as aside:
        state_dict, model, settings = diffusers_dit.read_folder(source)
        _write_native(aside, state_dict, model, settings)
        sides = [parity.diffusers(source), parity.ours(aside)]
        plain = parity.diffusers(source, plain=True)
        return _prove(*sides, model, source, aside, plain=plain)


def to_torch(values, source, out):
    if not values.bundle:
        files.check_suffix(out)
    with files.written_aside(out, overwrite=values.overwrite) as aside:
        model, settings, state_dict = _read_native(source, values.weights)
        logging.info("writing %s", out)
        if values.bundle:
            bundle.write(aside, state_dict, model, settings)
        else:
            files.write_state_dict(aside, state_dict)
        state_dict.clear()
        weights = aside / "model.safetensors" if values.bundle else aside
        sides = [parity.ours(source, values.weights), parity.official(weights, model)]
        file = None if values.bundle else out
        return _prove(*sides, model, native.step_folder(source), aside, out=file)


def to_diffusers(values, source, out):
    model = native.describe(source)[0]
    diffusers_dit.check(model)
    if values.vae:
        diffusers_dit.check_vae(values.vae, model)
    with files.written_aside(out, overwrite=values.overwrite) as aside:
        model, settings, state_dict = _read_native(source, values.weights)
        logging.info("writing %s", out)
        diffusers_dit.write_folder(aside, state_dict, model, settings, values.vae)
        sides = [parity.ours(source, values.weights), parity.diffusers(aside)]
        plain = parity.diffusers(aside, plain=True)
        code = _prove(*sides, model, native.step_folder(source), aside, plain=plain)
    if not values.vae:
        logging.info("no VAE in it: DiTPipeline.from_pretrained(%r, vae=...) needs one", out)
    return code


def inspect(values, source):
    """Prints what a checkpoint is: format, variant, shapes, step, EMA or not."""
    path = Path(source)
    if path.is_file():
        what, model = _inspect_state_dict(values, path)
    elif (path / "model.safetensors").is_file():
        config = files.read_json(path / "config.json")
        if not {"model", "space", "diffusion"} <= config.keys():
            raise ValueError(f"bundle must have the config.json of dit-convert, got {path}")
        what = {"format": "bundle for PyTorch", "space": config["space"], **config["diffusion"]}
        model = dit.DiTConfig.from_json(config["model"])
    elif diffusers_dit.is_folder(path):
        _, model, settings = diffusers_dit.read_folder(path)
        what = {"format": "diffusers", **settings["diffusion"]}
    else:
        model, settings, step, items = native.describe(path)
        what = {"format": "dit_jax", "step": step, "sets": ", ".join(items)}
        what |= settings["data"] | settings["diffusion"]
    shapes = jax.eval_shape(lambda: dit.init(model, jax.random.key(0)))
    what |= {"variant": variant(model), **model._asdict()}
    what["parameters"] = f"{sum(x.size for x in jax.tree.leaves(shapes)):,}"
    for name, value in what.items():
        print(f"{name:14s} {value}")


def _inspect_state_dict(values, path):
    groups = [] if path.suffix == ".safetensors" else files.groups(path)
    state_dict = files.read_state_dict(path, "ema" if "ema" in groups else "model")
    model = _read_config(values, state_dict)
    what = {
        "format": f"official state dict ({path.suffix})",
        "sets": ", ".join(groups) or "one, whether averaged or not it does not say",
        "dtype": ", ".join(sorted({str(x.dtype) for x in state_dict.values()})),
    }
    return what, model


COMMANDS = {
    "from-torch": (from_torch, ("FILE", "OUT")),
    "to-torch": (to_torch, ("CHECKPOINT", "OUT")),
    "from-diffusers": (from_diffusers, ("DIR", "OUT")),
    "to-diffusers": (to_diffusers, ("CHECKPOINT", "OUTDIR")),
    "inspect": (inspect, ("FILE_OR_DIR",)),
}


def variant(model):
    """The name of a DiTConfig, as "XL/2"."""
    names = {size: name for name, size in dit.SIZES.items()}
    name = names.get((model.depth, model.hidden_size, model.num_heads), "of no size of the paper")
    return f"{name}/{model.patch_size}" if name in dit.SIZES else name


def _give_memory_back():
    """Makes glibc return freed memory: it keeps blocks of up to 32 MB, all of a DiT's."""
    libc = ctypes.util.find_library("c")
    if libc and hasattr(ctypes.CDLL(libc), "mallopt"):
        ctypes.CDLL(libc).mallopt(-3, 2**20)  # M_MMAP_THRESHOLD, in bytes


def _check_file(source):
    if not Path(source).is_file():
        raise ValueError(f"FILE must be a file that exists, got {source}")


def _read_config(values, state_dict):
    return torch_dit.read_config(
        state_dict, num_heads=values.num_heads, num_classes=values.num_classes
    )


def _read(source, weights):
    logging.info("reading %s, %.2f GB", source, Path(source).stat().st_size / 1e9)
    return files.read_state_dict(source, weights)


def _read_native(source, weights):
    """(DiTConfig, settings, official state dict) of one of our checkpoints."""
    logging.info("reading %s", source)
    model, settings, params = native.read(source, weights)
    return model, settings, torch_dit.to_official(params, model)


def _write_native(aside, state_dict, model, settings):
    logging.info("converting DiT-%s, %s", variant(model), model.conditioning)
    params = torch_dit.from_official(state_dict, model)
    logging.info("writing")
    native.write(aside, model, settings, params)


def _prove(one, two, model, source, aside, *, out=None, plain=None):
    """Compares both sides, prints and writes the report; the exit code.

    out: the file that `aside` will be, if it is no folder. plain: diffusers as it is.
    """
    started = time.perf_counter()
    if importlib.util.find_spec("torch") is None:
        print("not checked: PyTorch is missing. pip install dit_jax[convert], then convert again")
        return 0
    inputs = parity.inputs(model)
    expected = one(*inputs)
    report = parity.measure(expected, two(*inputs))
    if plain:
        report["plain_diffusers"] = parity.measure(expected, plain(*inputs))["relative"]
    report["files"] = {"from": files.digests(source), "to": files.digests(aside)}
    place = aside / "parity.json"
    if out:
        place = Path(f"{out}.parity.json")
        report["files"]["to"] = {Path(out).name: report["files"]["to"][aside.name]}
    place.write_text(json.dumps(report, indent=2) + "\n")
    print(parity.table(report))
    logging.info("compared in %.1f s", time.perf_counter() - started)
    if plain:
        deviation = report["plain_diffusers"]
        print(f"plain diffusers is {deviation:.1e} off: see match_official in the README")
    if report["passed"]:
        print(f"the same to {report['relative']:.1e} of the largest output")
        return 0
    print(
        f"not the same: {report['relative']:.1e} of the largest output apart, "
        f"more than {report['tolerance']:.0e}"
    )
    return 1


def entry():
    sys.exit(command.run("dit-convert", define, main, takes=None))


if __name__ == "__main__":
    entry()
