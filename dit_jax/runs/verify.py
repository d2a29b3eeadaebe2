"""Compares everything that was saved in a directory with its digests."""

from dit_jax import settings as settings_lib
from dit_jax.checkpoint import steps, store
from dit_jax.convert import bundle, diffusers_dit, files
from dit_jax.data import arrayrecord
from dit_jax.errors import UserError
from dit_jax.machine import disk, words
from dit_jax.runs import record, snapshots, verifiable
from dit_jax.runs import workdir as workdirs

TOPICS = ("model", "diffusion", "data", "run")  # of the config.json of every run


def run(path):
    """Prints what each part of the path is or how it is damaged; returns the number of damaged."""
    parts = list(find_shards(path) or find_run(path) or find_files(path))
    if not parts:
        refuse(path)
    damaged = 0
    for name, check in parts:
        try:
            print(f"{name:40s} {check()}", flush=True)
        except (ValueError, OSError) as error:
            damaged += 1
            print(f"{name:40s} DAMAGED: {error}", flush=True)
    verb = "is" if damaged == 1 else "are"
    print(f"{damaged} of {len(parts)} {verb} damaged" if damaged else "no damage found")
    return damaged


def refuse(path):
    """Raises the UserError for a path without anything to check."""
    kind = None
    if path.is_file() and path.suffix in files.SUFFIXES:
        kind = "a weights file"
    elif bundle.is_weights(path / "model.safetensors"):
        kind = "a bundle"
    elif (path / "model_index.json").is_file() or diffusers_dit.is_folder(path):
        kind = "a folder of diffusers"  # of a pipeline, or of one of its models
    if kind:
        raise UserError(
            f"PATH must have the digests that dit-convert writes (parity.json), got {kind} "
            f"without: {path}"
        )
    verifiable.refuse(path)


def find_run(path):
    """[(name, check)] of a run or of saved steps; check() describes it or raises."""
    found = list(find_steps(path))
    if is_run(path) or found and disk.exists(path / "checkpoints"):
        found = [
            ("config.json", lambda: describe_config(path)),
            ("metrics.jsonl", lambda: describe_record(path)),
            *found,
            *(find_steps(path / snapshots.FOLDER)),
        ]
    aside = sorted(disk.children(path / "damaged")) if found else []
    message = "was set aside as corrupt; it is not used"
    return [*found, *((f"damaged/{each.name}", lambda: message) for each in aside)]


def is_run(path):
    """Whether a folder has the config or the record of a run, not those of another program."""
    try:
        fields = disk.read_json(path / "config.json")
        if all(isinstance(fields.get(topic), dict) for topic in TOPICS):
            return True
    except UserError:  # corrupt: the record decides
        pass
    try:
        return any("saved" in each for each in record.read(path / "metrics.jsonl"))
    except UserError:
        return False


def find_steps(path):
    if steps.is_complete(path):
        directory, saved = path.parent, [int(path.name)]
    else:
        directory = path / "checkpoints" if disk.exists(path / "checkpoints") else path
        saved = steps.saved(directory)
        for step in steps.incomplete(directory):
            if not saved and not has_items(directory / str(step)):
                continue  # a folder of another program with a number for a name
            reason = f"{directory / str(step)} is incomplete"
            yield f"{directory.name}/{step}", lambda reason=reason: complain(reason)
    for step in saved:
        yield f"{directory.name}/{step}", lambda step=step: describe_step(directory, step)


def has_items(step):
    return any(disk.exists(step / name) for name in (*store.ITEMS, "meta"))


def complain(reason):
    raise UserError(reason)


def describe_step(directory, step):
    try:
        store.verify(directory, step)
    except store.Damaged:
        if steps.is_complete(directory / str(step)):
            raise
        return "was deleted meanwhile by a running training"
    meta = store.read_meta(directory, step)
    count = sum(len(leaves) for leaves in meta["digests"].values())
    arrays = f"{words.count(count, 'array')} of {', '.join(meta['digests'])}"
    return f"{arrays}; loss {meta['loss']:.4f}" if "loss" in meta else arrays


def describe_config(path):
    """Checks that config.json exists and agrees with the newest step."""
    fields = disk.read_json(path / "config.json")
    if not fields:
        raise UserError(f"{path / 'config.json'} is missing or empty")
    settings = settings_lib.read(fields)
    step = steps.latest(path / "checkpoints")
    try:
        if step is not None:
            saved = store.read_meta(path / "checkpoints", step)["config"]
            workdirs.check_same(path, settings_lib.read(saved), settings)
    except store.Damaged:
        pass  # reported with the step
    return f"seed {settings.seed}, to step {settings.run.total_steps}"


def describe_record(path):
    """Checks that metrics.jsonl can be read and that the last step it names as saved exists."""
    records = record.read(path / "metrics.jsonl")
    newest = steps.latest(path / "checkpoints")
    if not records:
        if newest is not None:
            raise UserError(f"{path / 'metrics.jsonl'} is missing or empty")
        return "no record yet"
    saved = records[-1].get("saved")
    if saved and (newest is None or newest < saved):
        raise UserError(f"step {saved} was saved but is missing")
    return f"{words.count(len(records), 'record')} to step {records[-1]['step']}"


def find_shards(path):
    """[(name, check)] of the shards of every split or of a cache; [] for another manifest.json."""
    try:
        manifest = disk.read_json(path / "manifest.json")
    except UserError as error:
        reason = str(error)
        has_shards = any(".array_record-" in each.name for each in disk.children(path))
        return [("manifest.json", lambda: complain(reason))] if has_shards else []
    splits = manifest.get("splits", {"": manifest})
    groups = splits.values() if isinstance(splits, dict) else []
    shards = {}
    for group in groups:
        if isinstance(group, dict) and isinstance(group.get("shards"), dict):
            shards |= group["shards"]
    if not any(map(is_entry, shards.values())):
        return []
    return [
        (name, lambda name=name, shard=shard: describe_shard(path / name, shard))
        for name, shard in shards.items()
    ]


def is_entry(shard):
    return isinstance(shard, dict) and {"sha256", "file_bytes"} <= shard.keys()


def describe_shard(path, shard):
    if not is_entry(shard):
        raise UserError(f"manifest.json must have the size and the sha256 of {path.name}")
    arrayrecord.check_digest(path, shard)
    return f"{shard['file_bytes'] / 1e6:.1f} MB"


def find_files(path):
    """[(name, check)] of the files in a parity.json of dit-convert; [] for another or none."""
    folder, report = (path, path / "parity.json")
    if path.is_file():
        folder, report = path.parent, files.report_path(path)
    try:
        written = disk.read_json(report).get("files")
    except UserError as error:
        reason = str(error)
        return [(report.name, lambda: complain(reason))]
    digests = written.get("to") if isinstance(written, dict) else None
    return [
        (name, lambda name=name, digest=digest: describe_file(folder / name, digest))
        for name, digest in (digests if isinstance(digests, dict) else {}).items()
    ]


def describe_file(path, digest):
    if not path.is_file():
        raise UserError(f"{path} is missing")
    if disk.sha256(path) != digest:
        raise UserError(f"{path} is not the file that was written: its sha256 is not {digest}")
    return f"{path.stat().st_size / 1e6:.1f} MB"
