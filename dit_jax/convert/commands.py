"""What dit-convert does: each command converts, checks the result and returns the exit code.

`values` are the flags of dit-convert; the others are paths, as text.
"""

import ctypes.util
import dataclasses
import importlib.util
import json
import shutil
import time
from pathlib import Path

from absl import logging

from dit_jax.checkpoint import store
from dit_jax.convert import (
    bundle,
    class_names,
    describe,
    diffusers_dit,
    files,
    hub,
    native,
    parity,
    prediction,
    receipts,
    torch_dit,
    torch_inception,
    torch_vae,
)
from dit_jax.convert import card as cards
from dit_jax.diffusion.fields import is_path
from dit_jax.errors import UserError
from dit_jax.machine import disk
from dit_jax.sampling import autoencoder, extractor, fields
from dit_jax.settings import SIT, Diffusion

SHAPE_FLAGS = ("num_heads", "num_classes")
SETTING_FLAGS = ("space", "schedule", "prediction")


def return_freed_memory():
    """Makes glibc return freed memory to the system: it keeps blocks of up to 32 MB by default."""
    libc = ctypes.util.find_library("c")
    if libc and hasattr(ctypes.CDLL(libc), "mallopt"):
        ctypes.CDLL(libc).mallopt(-3, 2**20)  # M_MMAP_THRESHOLD, in bytes


def from_torch(values, source, out):
    _check_file(source)

    def convert(temporary):
        if values["weights"].present and not files.groups(source):
            raise UserError(
                f"weights must not be given for a file with one set of parameters, got {source}"
            )
        size = sum(file.stat().st_size for file in files.parts(source))
        logging.info("reading %s, %.0f MB", source, size / 1e6)
        state_dict = files.read_state_dict(source, values.weights)
        model, settings, names = _read_settings(values, source, state_dict)
        names |= class_names.read(values.class_names, model.num_classes)
        _write_native(temporary, state_dict, model, settings, out, **names)
        sides = [parity.official(source, model, values.weights), parity.ours(temporary)]
        return _compare(*sides, model, settings)

    return _convert(values, source, out, convert)


def from_diffusers(values, source, out):
    def convert(temporary):
        state_dict, model, settings = diffusers_dit.read_folder(source, space=values.space)
        logging.info("not recorded in the folder: assuming %s (--space)", values.space)
        names = class_names.of_pipeline(source, model.num_classes)
        names |= class_names.read(values.class_names, model.num_classes)
        _write_native(temporary, state_dict, model, settings, out, **names)
        sides = [parity.diffusers(source), parity.ours(temporary)]
        return _compare(*sides, model, settings, plain=parity.diffusers(source, plain=True))

    return _convert(values, source, out, convert)


def to_torch(values, source, out):
    model, settings, *_ = native.describe(source)
    torch_dit.check(model)
    if values.bundle:
        native.check_prediction(settings, "a bundle")
    args = prediction.args_of(settings.diffusion)

    def convert(temporary):
        if values.bundle:
            return _write_bundle(temporary, source, values.weights, out)
        model, settings, state_dict = _read_native(source, values.weights)
        logging.info("writing %s", out)
        files.write_state_dict(temporary, state_dict, args)
        state_dict.clear()
        sides = [parity.ours(source, values.weights), parity.official(temporary, model)]
        return _compare(*sides, model, settings)

    return _convert(values, native.step_folder(source), out, convert, folder=values.bundle)


def to_diffusers(values, source, out):
    model, settings, *_ = native.describe(source)
    diffusers_dit.check(model)
    native.check_prediction(settings, "diffusers")
    vae = values.vae and Path(values.vae)
    if vae:
        diffusers_dit.check_vae(vae, model)

    def convert(temporary):
        _, _, state_dict = _read_native(source, values.weights)
        logging.info("writing %s", out)
        names = fields.class_names(native.read_meta(source))
        diffusers_dit.write_folder(temporary, state_dict, model, settings, vae, names)
        sides = [parity.ours(source, values.weights), parity.diffusers(temporary)]
        return _compare(*sides, model, settings, plain=parity.diffusers(temporary, plain=True))

    code = _convert(values, native.step_folder(source), out, convert)
    if settings.data.space == "pixels":
        logging.info("this is a pixel model: DiTPipeline decodes latents and cannot sample it")
    elif not vae:
        logging.info("the folder has no VAE: use DiTPipeline.from_pretrained(%r, vae=...)", out)
    return code


def vae(values, *paths):
    *source, out = paths
    source = source[0] if source else torch_vae.download(values.from_hub)

    torch_vae.find(source)

    def convert(temporary):
        logging.info("reading %s", source)
        config, state_dict = torch_vae.read(source)
        if not torch_vae.read_fields(source):
            message = "no config.json: assuming Stable Diffusion's autoencoder, %d groups, scale %s"
            logging.warning(message, config.num_groups, config.scale)
        torch_dit.log_dtypes(state_dict)
        logging.info("writing %s, latent shift %s, scale %s", out, config.shift, config.scale)
        autoencoder.save(temporary, config, torch_vae.from_torch(state_dict, config))
        if importlib.util.find_spec("diffusers") is None:
            return {"passed": None}
        return parity.autoencoders(source, temporary)

    return _convert(values, source, out, convert)


def inception(values, source, out):
    files.check_folder(out)
    sha256 = torch_inception.check_file(source, other_weights=values.other_weights)

    def convert(temporary):
        logging.info("reading %s", source)
        params = torch_inception.from_torch(torch_inception.read(source))
        logging.info("writing %s", out)
        published = sha256 == torch_inception.SHA256
        extractor.save(temporary, params, sha256=sha256, published=published)
        if importlib.util.find_spec("torch") is None:
            return {"passed": None}
        return parity.inceptions(source, temporary)

    return _convert(values, source, out, convert)


def card(values, source, out):
    """Writes the model card of a checkpoint to a file."""
    subject = _read_subject(values, source, values.repo)
    logging.info("writing %s", out)
    disk.write_text(out, cards.write(subject))


def push(values, source, repository):
    """Uploads a checkpoint, as a bundle with its card, to the Hugging Face hub."""
    subject = _read_subject(values, source, repository)
    torch_dit.check(subject.model)
    native.check_prediction(subject.settings, "a bundle")
    own_card = values.card and Path(values.card).read_text(encoding="utf-8")
    if not own_card and not values.license:
        logging.warning("the card will say that the licence is not stated: see --license")
    replaces = bool(own_card) or values.overwrite
    target = hub.look(
        repository, revision=values.revision, private=values.private, replaces_card=replaces
    )
    with files.scratch(prefix="dit-push-") as parent:
        folder = parent / "bundle"
        report = _write_bundle(folder, source, values.weights, repository)
        text = own_card or cards.write(subject._replace(report=report))
        (folder / hub.CARD).write_text(text, encoding="utf-8")
        for name, receipt in receipts.names(subject.receipts).items():
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(receipt.path, folder / name)
        _add_digests(report, native.step_folder(source), folder, folder / hub.REPORT)
        if report["passed"] is False:
            return _print_report(report, hub.REPORT, "nothing was uploaded")
        address = hub.upload(target, folder, private=values.private)
    code = _print_report(report, f"{repository}/{hub.REPORT}")
    print(f"pushed: {address}")
    return code


def pull(values, repository, out):
    """Downloads what `push` uploaded, and converts it."""
    folder, commit = hub.download(repository, values.revision)

    def convert(temporary):
        source = folder / hub.WEIGHTS
        model, settings = bundle.read_config(folder)
        meta = {"pulled": {"repository": repository, "commit": commit}}
        meta |= bundle.read_class_names(folder)
        _write_native(temporary, files.read_state_dict(source), model, settings, out, **meta)
        for path in (*folder.glob(hub.CARD), *folder.glob(f"{receipts.FOLDER}/*.json")):
            copy = temporary / path.relative_to(folder)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)
        sides = [parity.official(source, model), parity.ours(temporary)]
        return _compare(*sides, model, settings)

    return _convert(values, folder, out, convert)


def inspect(values, source):
    """Prints the format, variant, shapes, step and parameter sets of a checkpoint."""
    for name, value in describe.describe(source, **_shape_flags(values)).items():
        print(f"{name:16s} {value}")


def _check_file(source):
    path = Path(source)
    if path.is_dir():
        weights = path / "model.safetensors"
        hint = f": use {weights}" if weights.is_file() else ""
        if diffusers_dit.is_folder(path):
            hint = ": use from-diffusers"
        elif native.kind(path) == "model":
            hint = ": use to-torch or to-diffusers"
        raise UserError(f"FILE must be a file, got the folder {source}{hint}")


def _shape_flags(values):
    return {"num_heads": values.num_heads or 0, "num_classes": values.num_classes or 0}


def _read_settings(values, source, state_dict):
    """Returns (DiTConfig, settings, more meta) of an official state dict, or of its bundle."""
    is_set = any(values[name].present for name in (*SHAPE_FLAGS, *SETTING_FLAGS))
    if bundle.is_weights(source) and not is_set:
        logging.info("reading the settings from the config.json of the bundle")
        folder = Path(source).parent
        return *bundle.read_config(folder), bundle.read_class_names(folder)
    model = torch_dit.read_config(state_dict, **_shape_flags(values))
    diffusion, evidence = _read_diffusion(values, source, state_dict, model)
    process = f"a {diffusion.schedule} schedule (--schedule)"
    if is_path(diffusion):
        process = f"the {diffusion.process} path"
    logging.info(
        "not recorded in the weights: assuming %d heads (--num_heads), %d classes%s "
        "(--num_classes), %s (--space), %s, %s prediction (--prediction), "
        "class names: %s (--class_names)",
        *(model.num_heads, model.num_classes, " and a null label" if model.null_label else ""),
        *(values.space, process, diffusion.prediction, values.class_names or "none"),
    )
    if is_path(diffusion):
        logging.warning("this is a SiT (%s): dit-sample samples it along its path", evidence)
    return model, native.settings_of(model, space=values.space, diffusion=diffusion), {}


def _read_diffusion(values, source, state_dict, model):
    """Returns (a `settings.Diffusion`, what says so) by the file, or by a flag that differs."""
    found, evidence = prediction.find(source, state_dict, model)
    if values.prediction not in (None, found.prediction):
        is_velocity = values.prediction == "velocity"
        return Diffusion(**SIT) if is_velocity else Diffusion(values.schedule), "--prediction"
    if evidence:
        if values["schedule"].present:
            raise UserError(
                f"--schedule must be left out for a SiT, which has a path, got {values.schedule}"
            )
        hint = "; --prediction=noise for a DiT" if found.prediction == "velocity" else ""
        return found, evidence + hint
    return dataclasses.replace(found, schedule=values.schedule), ""


def _read_native(source, weights):
    """Returns (DiTConfig, settings, official state dict) of a dit_jax checkpoint."""
    logging.info("reading %s", source)
    model, settings, params = native.read(source, weights)
    return model, settings, torch_dit.to_official(params, model)


def _read_subject(values, source, repository):
    """Returns the `card.Subject` of a dit_jax checkpoint, with the receipts of its scores."""
    model, settings, step, items = native.describe(source)
    if values.weights not in items:
        raise UserError(f"weights must be of {', '.join(items)} in {source}, got {values.weights}")
    meta, folder = native.read_meta(source), native.step_folder(source).parent
    judged = receipts.choose(
        values.scores or (),
        folder.parent if folder.name == "checkpoints" else folder,
        step=step,
        weights=values.weights,
        digest=store.digest(meta, values.weights),
    )
    return cards.Subject(
        *(model, settings, meta, values.weights, judged),
        repository=repository or "",
        licence=values.license or "",
        datasets=tuple(values.dataset or ()),
    )


def _write_bundle(folder, source, weights, out):
    """Writes a bundle of a dit_jax checkpoint; returns the report. out: for the message."""
    names = fields.class_names(native.read_meta(source))
    model, settings, state_dict = _read_native(source, weights)
    logging.info("writing %s", out)
    bundle.write(folder, state_dict, model, settings, names)
    state_dict.clear()
    written = parity.official(folder / "model.safetensors", model)
    return _compare(parity.ours(source, weights), written, model, settings)


def _write_native(temporary, state_dict, model, settings, out, **meta):
    variant = model.name
    torch_dit.log_dtypes(state_dict)
    logging.info("writing %s: DiT %s, %s", out, variant, model.conditioning)
    params = torch_dit.from_official(state_dict, model)
    native.write(temporary, model, settings, params, **meta)


def _compare(source, converted, model, settings, *, plain=None):
    """Returns the parity report of two sides. plain: the side of uncorrected diffusers."""
    if importlib.util.find_spec("torch") is None:
        return {"passed": None}
    started = time.perf_counter()
    times = parity.times(settings.diffusion)
    inputs = parity.inputs(model, times)
    expected = source(*inputs)
    report = parity.measure(expected, converted(*inputs), times)
    if plain:
        report["plain_diffusers"] = parity.measure(expected, plain(*inputs), times)["relative"]
    logging.info("compared in %.1f s", time.perf_counter() - started)
    return report


def _convert(values, source, out, convert, *, folder=True):
    """Runs convert(temporary path) -> report, moves the output to `out`; returns the exit code."""
    out, options = Path(out), {"folder": folder, "overwrite": values.overwrite}
    with files.temporary_output(out, source=source, **options) as temporary:
        report = convert(temporary)
        path = temporary / "parity.json" if folder else files.report_path(temporary)
        _add_digests(report, source, temporary, path)
        consequence = f"{out} was written for inspection"
        if report["passed"] is False and out.exists():
            files.discard(temporary)
            consequence = f"{out} is unchanged"
    report_path = out / "parity.json" if folder else files.report_path(out)
    return _print_report(report, report_path, consequence)


def _add_digests(report, source, converted, path):
    """Adds the sha256 of the files of both sides to a report, and writes it to a path."""
    report["files"] = {"from": files.digests(source), "to": files.digests(converted)}
    path.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n")


def _print_report(report, path, consequence=""):
    """Prints a report and returns the exit code. consequence: what a failed check led to."""
    if report["passed"] is None:
        print(
            "not checked: PyTorch or diffusers is missing. "
            "Run pip install dit_jax[convert] and convert again"
        )
        return 0
    print(parity.table(report))
    if "plain_diffusers" in report:
        error = parity.text(report["plain_diffusers"])
        print(
            f"uncorrected diffusers: relative error {error}; "
            "see match_official in dit_jax/convert/README.md"
        )
    result = (
        f"relative error {parity.text(report['relative'])}, tolerance {report['tolerance']:.0e}"
    )
    if report["passed"]:
        print(f"passed: {result}; report: {path}")
        return 0
    print(f"failed: {result}; {consequence}")
    return 1
