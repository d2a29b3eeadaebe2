"""What dit-evaluate is asked to judge, and the checks that need neither jax nor the images."""

import dataclasses

from dit_jax import settings
from dit_jax.checkpoint import steps
from dit_jax.errors import UserError
from dit_jax.evals import presets
from dit_jax.machine import disk
from dit_jax.sampling import fields

EXISTING = ("weights", "seed", "vae", "sampling", "preset")  # mean nothing for images that exist


@dataclasses.dataclass(frozen=True)
class Request:
    """What to judge, and how. JSON, since a receipt keeps it.

    samples: a run, a checkpoint, a folder of images or an .npz. sampling: options that differ from
    those of the preset and of the run. The other fields are the flags of dit-evaluate.
    """

    samples: str
    reference: str | None = None
    inception: str | None = None
    preset: str | None = None
    num_samples: int | None = None
    weights: str = "ema"
    seed: int = 0
    vae: str | None = None
    vae_dtype: str = "float32"
    sampling: dict = dataclasses.field(default_factory=dict)
    bootstrap: int | None = None
    fid_infinity: bool = False

    @classmethod
    def from_receipt(cls, content, path):
        """The Request of a receipt; UserError if another version of this package wrote it."""
        if unknown := content["arguments"].keys() - {each.name for each in dataclasses.fields(cls)}:
            raise UserError(f"receipt must be of known arguments, got {min(unknown)} in {path}")
        return cls(**content["arguments"])

    def check(self):
        """UserError for what is wrong whatever the images are."""
        settings.read_topic(settings.Sampling, self.sampling)
        if self.preset:
            presets.find(self.preset)
        is_model = is_checkpoint(self.samples)
        known = fields.look(self.samples) if is_model else None
        if self.vae:
            fields.check_vae(self.vae, known)
        if given := [] if is_model else [name for name in EXISTING if self._differs(name)]:
            raise UserError(f"{given[0]} must not be given for images that exist: {self.samples}")
        if self.inception and not self.reference:
            raise UserError("--reference must be given with --inception: an .npz of ADM's format")
        needs = {"reference": self.reference, "preset": self.preset}
        needs = [f"--{name}" for name, value in needs.items() if value]
        needs += [] if is_model else ["images that exist"]
        if needs and not self.inception:
            raise UserError(f"--inception must be given with {needs[0]}")
        if known:
            self._check_model(known)

    def _check_model(self, known):
        """UserError if the options do not fit the model of a `sampling.fields.Known`."""
        if known.settings.data.space != "pixels" and not self.vae:
            raise UserError("--vae must be given for a model of latents, to decode its samples")
        preset = presets.find(self.preset).sampling if self.preset else {}
        fields.check_options(known, preset | self.sampling)

    def _differs(self, name):
        default = {each.name: each.default for each in dataclasses.fields(self)} | {"sampling": {}}
        return getattr(self, name) != default[name]


FLAGS = tuple(
    each.name for each in dataclasses.fields(Request) if each.name not in ("samples", "sampling")
)


def is_checkpoint(path):
    """Whether a path is a run or a checkpoint; False for a folder of images or an .npz.

    UserError if there is nothing at the path, or a run without a saved step.
    """
    path = disk.path(path)
    try:
        steps.locate(path)
    except UserError:
        exists = disk.is_on_disk(path) and path.exists()
        if not exists or any((path / name).exists() for name in ("checkpoints", "config.json")):
            raise
        return False
    return True


def home(path):
    """The folder of a run or a checkpoint, where its evaluation goes by default."""
    if not is_checkpoint(path):
        raise UserError(f"--out must be given for images that exist: {path}")
    directory, _ = steps.locate(path)
    return directory.parent if directory.name == "checkpoints" else directory
