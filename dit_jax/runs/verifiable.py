"""Whether a folder has anything that `runs.verify` checks: a quick look, without jax."""

from dit_jax.errors import UserError
from dit_jax.machine import disk

NAMES = (  # of what the commands write, and of what other programs write for them
    *("config.json", "metrics.jsonl", "checkpoints", "manifest.json", "parity.json"),
    *("model.safetensors", "model_index.json", "transformer", "_CHECKPOINT_METADATA"),
)
PARTS = (".array_record-", "diffusion_pytorch_model")  # of the names of shards and weights


def check(path):
    """UserError for a folder on a disk without a name that `runs.verify` knows."""
    if not disk.is_on_disk(path) or not path.is_dir():
        return
    for name in (each.name for each in disk.children(path)):
        if name in NAMES or name.isdecimal() or any(part in name for part in PARTS):
            return
    refuse(path)


def refuse(path):
    """Raises the UserError for a path without anything to check."""
    raise UserError(
        "PATH must be a run, saved steps, an output of dit-prepare or dit-encode, or a bundle, "
        f"pipeline or file of dit-convert, got nothing of the kind: {path}"
    )
