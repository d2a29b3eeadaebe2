"""Starts a run from the parameters of another one: --init_from.

They come from the EMA of a run or of a converted checkpoint, since the EMA is what one samples
from. The parameters and the EMA of the new run both start from them; its step is 0 and its
optimizer state is new. The source is recorded in the workdir's init_from.json and in the meta of
every checkpoint.
"""

import functools
import hashlib
import json
import unicodedata

from absl import logging

from dit_jax import settings as settings_lib
from dit_jax.checkpoint import steps, store
from dit_jax.diffusion import fields as diffusion_fields
from dit_jax.errors import UserError
from dit_jax.machine import cluster, disk, prng
from dit_jax.models import dit, transfer
from dit_jax.runs import workdir as workdirs
from dit_jax.sampling import fields, imagenet
from dit_jax.train import state as states

WEIGHTS = "ema"


def choose(workdir, init_from, model):
    """The origin of the run in workdir, or of a new one: {"path", "step", "weights", "sha256"}.

    None if it starts from random parameters. `init_from` decides until the workdir has a saved
    step, and the workdir's record afterwards. UserError if the two differ, or if the parameters
    cannot start a model of this DiTConfig. Writes nothing.
    """
    is_run = disk.exists(workdir / "config.json")
    recorded = disk.read_json(workdir / workdirs.ORIGIN) or None if is_run else None
    if steps.latest(workdir / "checkpoints") is not None:
        if init_from:
            _check_recorded(workdir, recorded, init_from)
        return recorded
    if not init_from and not recorded:
        return None
    origin = _find(init_from or recorded["path"], model)
    if not init_from and origin != recorded:
        raise UserError(
            f"init_from must be given: {workdir} started from step {recorded['step']} of "
            f"{recorded['path']}, but saved nothing, and that has changed to step {origin['step']}"
        )
    return origin


def _check_recorded(workdir, recorded, init_from):
    """Logs that init_from is ignored; UserError if the run started from something else."""
    started = recorded["path"] if recorded else "random parameters"
    if started != str(disk.absolute(init_from)):
        raise UserError(
            f"init_from must be left out, or workdir be another: the run in {workdir} started "
            f"from {started}, got {init_from}"
        )
    logging.info("init_from is ignored: %s has started from it already", workdir)


def _find(path, model):
    """The origin of a new run; UserError if it cannot start from there."""
    directory, meta = _open(path)
    transfer.check(dit.DiTConfig.from_json(meta["model"]), model)
    digests = json.dumps(meta["digests"][WEIGHTS], sort_keys=True)
    sha256 = hashlib.sha256(digests.encode()).hexdigest()  # of the digests of all arrays
    return {
        "path": str(disk.absolute(path)),
        "step": meta["step"],
        "weights": WEIGHTS,
        "sha256": sha256,
    }


def _open(path):
    """(directory of the steps, meta) of the newest step of a path."""
    path = disk.path(path)
    directory, step = steps.locate(path, name="init_from")
    return directory, store.read_meta(directory, step, of="model")


def create_state(origin, settings, parts, class_names=()):
    """The TrainState at step 0 that starts from an origin, and logs what it took and changed.

    class_names: of the new run's labels; () if they have none.
    """
    directory, step = steps.locate(origin["path"])[0], origin["step"]
    with cluster.together(store.Damaged):
        meta = store.read_meta(directory, step, of="model")
        source = dit.DiTConfig.from_json(meta["model"])
        params = store.restore_params(
            directory,
            step,
            lambda: dit.init(source, prng.key(0)),
            weights=WEIGHTS,
            mesh=parts.mesh,
            verify=False,
        )
    store.compare(directory / str(step), {WEIGHTS: params}, meta["digests"])
    rows = _match_classes(meta, settings, parts.model, class_names)
    logging.info("starting from step %d of %s (%s):", step, origin["path"], WEIGHTS)
    for line in _describe(meta, settings, parts.model, rows):
        logging.info("  %s", line)
    adapt = functools.partial(transfer.adapt, source=source, target=parts.model, rows=rows)
    return states.create(adapt, parts.optimizer, params, parts.mesh, **parts.state_options)


def describe(origin, settings, model, class_names=()):
    """What a new run takes from its origin and what it changes, as lines of text."""
    directory = steps.locate(origin["path"])[0]
    meta = store.read_meta(directory, origin["step"], of="model")
    return _describe(meta, settings, model, _match_classes(meta, settings, model, class_names))


def _describe(meta, settings, model, rows):
    source = dit.DiTConfig.from_json(meta["model"])
    before = settings_lib.read(meta["config"])
    return transfer.describe(source, model, rows) + _differences(before, settings)


def _match_classes(meta, settings, model, class_names):
    """`_match` of the classes of a checkpoint and of a new run: by name, if both have names."""
    if class_names and (named := fields.class_names(meta)):
        return _match(named, imagenet.named(class_names))
    before = settings_lib.read(meta["config"])
    classes = before.data.classes or range(meta["model"]["num_classes"])
    return _match(classes, settings.data.classes or range(model.num_classes))


def _match(old, new):
    """For each label of the new model the old label of the same class, or None.

    old, new: the class of each label, by its name or its number. A name with an accent is the same
    with one letter for both, as Linux writes it, and with two, as macOS does.
    """
    labels = {_composed(each): label for label, each in enumerate(old)}
    return [labels.get(_composed(each)) for each in new]


def _composed(each):
    return unicodedata.normalize("NFC", each) if isinstance(each, str) else each


def _differences(before, settings):
    """What the new model has to learn anew although its parameters fit, as lines of text."""
    shown = diffusion_fields.shown(before.diffusion) | diffusion_fields.shown(settings.diffusion)
    names = [("diffusion", name) for name in shown] + [("data", "space")]
    lines = []
    for topic, name in names:
        old, new = (getattr(getattr(each, topic), name) for each in (before, settings))
        if old != new:
            hint = ", so the network has to learn the time again" if name == "time_scale" else ""
            lines.append(f"{topic}.{name}: {old} before, {new} now{hint}")
    return lines
