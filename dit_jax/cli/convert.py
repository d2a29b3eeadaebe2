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
import sys
import time
from pathlib import Path

import jax
from absl import flags, logging

from dit_jax import autoencoder
from dit_jax.cli import command
from dit_jax.convert import bundle, diffusers_dit, files, native, parity, torch_dit, torch_vae
from dit_jax.models import dit, vae


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
        "space", "latents", ["latents", "pixels"], "from-torch: what it was trained on.", **options
    )
    flags.DEFINE_enum(
        "schedule", "linear", ["linear", "squared_cosine"], "from-torch: of its noise.", **options
    )


def main(values, *words):
    word, *paths = words or ("",)
    if word not in COMMANDS:
        raise ValueError(f"command must be one of {', '.join(COMMANDS)}, got {word!r}")
    convert, names, takes = COMMANDS[word]
    if values.from_hub:  # instead of the first of them
        names = names[1:]
    if len(paths) != len(names):
        raise ValueError(f"{word} takes {' '.join(names)}, got {' '.join(paths)!r}")
    for name, path in zip(names, paths, strict=True):
        if not path:
            raise ValueError(f"{name} must not be empty")
    for name in values:
        if values[name].present and name not in takes:
            have = ", ".join(f"--{name}" for name in takes)
            raise ValueError(f"{word} takes {have}, got --{name}")
    _give_memory_back()
    return convert(values, *paths)


def from_torch(values, source, out):
    _check_file(source)
    files.check_folder(out)
    with files.written_aside(out, source=source, overwrite=values.overwrite) as aside:
        if values["weights"].present and not files.groups(source):
            raise ValueError(f"weights can be chosen of a file with ema and model, got {source}")
        state_dict = _read(source, values.weights)
        model = _read_config(values, state_dict)
        logging.info(
            "weights do not tell: taken for %d heads (--num_heads), %s (--space), noise %s "
            "(--schedule)",
            *(model.num_heads, values.space, values.schedule),
        )
        settings = native.settings_of(model, space=values.space, schedule=values.schedule)
        _write_native(aside, state_dict, model, settings, out)
        one = parity.official(source, model, values.weights)
        return _prove(one, parity.ours(aside), model, source, aside, out)


def from_diffusers(values, source, out):
    files.check_folder(out)
    with files.written_aside(out, source=source, overwrite=values.overwrite) as aside:
        logging.info("reading %s", source)
        state_dict, model, settings = diffusers_dit.read_folder(source)
        _write_native(aside, state_dict, model, settings, out)
        sides = [parity.diffusers(source), parity.ours(aside)]
        plain = parity.diffusers(source, plain=True)
        return _prove(*sides, model, source, aside, out, plain=plain)


def to_torch(values, source, out):
    if values.bundle:
        files.check_folder(out)
    elif not Path(out).suffix:
        raise ValueError(
            f"OUT must end with {', '.join(files.SUFFIXES)} or be a --bundle, got {out}"
        )
    else:
        files.check_suffix(out)
    step = native.step_folder(source)
    with files.written_aside(out, source=step, overwrite=values.overwrite) as aside:
        model, settings, state_dict = _read_native(source, values.weights)
        logging.info("writing %s", out)
        if values.bundle:
            bundle.write(aside, state_dict, model, settings)
        else:
            files.write_state_dict(aside, state_dict)
        state_dict.clear()
        weights = aside / "model.safetensors" if values.bundle else aside
        sides = [parity.ours(source, values.weights), parity.official(weights, model)]
        return _prove(*sides, model, step, aside, out)


def to_diffusers(values, source, out):
    files.check_folder(out)
    model, settings, *_ = native.describe(source)
    diffusers_dit.check(model)
    if values.vae:
        diffusers_dit.check_vae(values.vae, model)
    step = native.step_folder(source)
    with files.written_aside(out, source=step, overwrite=values.overwrite) as aside:
        model, settings, state_dict = _read_native(source, values.weights)
        logging.info("writing %s", out)
        diffusers_dit.write_folder(aside, state_dict, model, settings, values.vae)
        sides = [parity.ours(source, values.weights), parity.diffusers(aside)]
        plain = parity.diffusers(aside, plain=True)
        code = _prove(*sides, model, step, aside, out, plain=plain)
    if settings["data"]["space"] == "pixels":
        logging.info("a model of pixels: DiTPipeline decodes latents, and cannot draw it")
    elif not values.vae:
        logging.info("no VAE in it: DiTPipeline.from_pretrained(%r, vae=...) needs one", out)
    return code


def convert_vae(values, *paths):
    *source, out = paths
    files.check_folder(out)
    source = source[0] if source else torch_vae.download(values.from_hub)
    with files.written_aside(out, source=source, overwrite=values.overwrite) as aside:
        logging.info("reading %s", source)
        config, state_dict = torch_vae.read(source)
        logging.info("writing %s, latents less %s, times %s", out, config.shift, config.scale)
        autoencoder.save(aside, config, torch_vae.from_torch(state_dict, config))
        report = {"passed": None}
        if importlib.util.find_spec("diffusers") is not None:
            report = parity.autoencoders(source, aside)
        return _write_report(report, source, aside, out)


def inspect(values, source):
    """Prints what a checkpoint is: format, variant, shapes, step, EMA or not."""
    path = Path(source)
    if not path.exists():
        raise ValueError(f"FILE_OR_DIR must exist, got {source}")
    if path.is_file():
        what = _inspect_state_dict(values, path)
    elif (path / "dit.py").is_file():
        what = _inspect_bundle(path)
    elif torch_vae.is_folder(path):
        config, _ = torch_vae.read(path)
        what = {"format": "autoencoder of diffusers", **_of_vae(config)}
    elif diffusers_dit.is_folder(path):
        _, model, settings = diffusers_dit.read_folder(path)
        what = {"format": "diffusers", **settings["diffusion"], **_of_dit(model)}
    elif native.kind(path) == "vae":
        what = {"format": "autoencoder of dit_jax", **_of_vae(autoencoder.describe(path))}
    elif native.kind(path) == "model":
        model, settings, step, items = native.describe(path)
        what = {"format": "dit_jax", "step": step, "sets": ", ".join(items)}
        what |= settings["data"] | settings["diffusion"] | _of_dit(model)
    else:
        raise ValueError(
            "FILE_OR_DIR must be a state dict, a run, a converted checkpoint, a bundle or a folder "
            f"of diffusers, got {source}"
        )
    for name, value in what.items():
        print(f"{name:16s} {value}")


def _of_dit(model):
    count = _count(lambda: dit.init(model, jax.random.key(0)))
    return {"variant": variant(model), **model._asdict(), "parameters": count}


def _of_vae(config):
    return {**config._asdict(), "parameters": _count(lambda: vae.init(config, jax.random.key(0)))}


def _count(init):
    return f"{sum(x.size for x in jax.tree.leaves(jax.eval_shape(init))):,}"


def _inspect_bundle(path):
    config = files.read_json(path / "config.json")
    if not (path / "model.safetensors").is_file() or not {"model", "space"} <= config.keys():
        raise ValueError(
            f"bundle must have the model.safetensors and config.json of dit-convert, got {path}"
        )
    what = {"format": "bundle for PyTorch", "space": config["space"], **config["diffusion"]}
    return what | _of_dit(dit.DiTConfig.from_json(config["model"]))


def _inspect_state_dict(values, path):
    files.check_suffix(path)
    groups = files.groups(path)
    state_dict = files.read_state_dict(path, groups[0] if groups else "ema")
    what = {
        "format": f"official state dict ({path.suffix})",
        "sets": ", ".join(groups) or "one, whether averaged or not it does not say",
        "dtype": ", ".join(sorted({str(x.dtype) for x in state_dict.values()})),
    }
    return what | _of_dit(_read_config(values, state_dict))


READING = ("num_heads", "num_classes")
COMMANDS = {  # what it does, the words and the flags that it takes
    "from-torch": (
        from_torch,
        ("FILE", "OUT"),
        ("overwrite", "weights", *READING, "space", "schedule"),
    ),
    "to-torch": (to_torch, ("CHECKPOINT", "OUT"), ("overwrite", "weights", "bundle")),
    "from-diffusers": (from_diffusers, ("DIR", "OUT"), ("overwrite",)),
    "to-diffusers": (to_diffusers, ("CHECKPOINT", "OUTDIR"), ("overwrite", "weights", "vae")),
    "vae": (convert_vae, ("DIR_OR_FILE", "OUT"), ("overwrite", "from_hub")),
    "inspect": (inspect, ("FILE_OR_DIR",), READING),
}


def variant(model):
    """A DiTConfig in words, as "XL/2"."""
    names = {size: name for name, size in dit.SIZES.items()}
    own = f"{model.depth} blocks of {model.hidden_size}"
    size = names.get((model.depth, model.hidden_size, model.num_heads), own)
    return f"{size}/{model.patch_size}"


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
        raise ValueError(f"FILE must be a file, got the folder {source}{hint}")
    if not path.is_file():
        raise ValueError(f"FILE must be a file that exists, got {source}")


def _read_config(values, state_dict):
    return torch_dit.read_config(
        state_dict, num_heads=values.num_heads or 0, num_classes=values.num_classes or 0
    )


def _read(source, weights):
    logging.info("reading %s, %.0f MB", source, Path(source).stat().st_size / 1e6)
    return files.read_state_dict(source, weights)


def _read_native(source, weights):
    """(DiTConfig, settings, official state dict) of one of our checkpoints."""
    logging.info("reading %s", source)
    model, settings, params = native.read(source, weights)
    return model, settings, torch_dit.to_official(params, model)


def _write_native(aside, state_dict, model, settings, out):
    logging.info("writing %s, a DiT of %s, %s", out, variant(model), model.conditioning)
    params = torch_dit.from_official(state_dict, model)
    native.write(aside, model, settings, params)


def _prove(one, two, model, source, aside, out, *, plain=None):
    """Compares both sides, prints and writes the report; the exit code.

    aside will be out. plain: the side of diffusers as it is.
    """
    started = time.perf_counter()
    report = {"passed": None}
    if importlib.util.find_spec("torch") is not None:
        inputs = parity.inputs(model)
        expected = one(*inputs)
        report = parity.measure(expected, two(*inputs))
        if plain:
            report["plain_diffusers"] = parity.measure(expected, plain(*inputs))["relative"]
        logging.info("compared in %.1f s", time.perf_counter() - started)
    return _write_report(report, source, aside, out)


def _write_report(report, source, aside, out):
    """Adds the digests to a report, writes and prints it; the exit code. aside will be out."""
    report["files"] = {"from": files.digests(source), "to": files.digests(aside)}
    place = Path(out) / "parity.json"
    if aside.is_file():
        place = Path(f"{out}.parity.json")
        report["files"]["to"] = {Path(out).name: report["files"]["to"][aside.name]}
    inside = place if aside.is_file() else aside / place.name
    inside.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n")
    return _tell(report, place)


def _tell(report, place):
    """Prints a report that lies at `place`; the exit code."""
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
    print(
        f"not the same: {apart} apart, more than {report['tolerance']:.0e}; "
        f"what was written is kept to be looked at, the report is {place}"
    )
    return 1


def entry():
    sys.exit(command.run("dit-convert", define, main, takes=None))


if __name__ == "__main__":
    entry()
