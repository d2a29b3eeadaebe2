"""What dit-evaluate is asked to judge, and the checks that need no jax."""

import dataclasses
import typing

from dit_jax import settings
from dit_jax.checkpoint import peek, steps
from dit_jax.errors import UserError
from dit_jax.evals import presets
from dit_jax.machine import disk
from dit_jax.sampling import fields

FEWEST = 6  # images that all scores need: density, for its 5th neighbour
MOST = 10_000_000  # samples: 200 times those of the paper, and shards are numbered to here
MOST_RESAMPLES = 10_000
WORDS = {str: "text", int: "a whole number", bool: "true or false", dict: "an object"}
RULES = {
    "weights": ("ema or params", lambda x: x in ("ema", "params")),
    "vae_dtype": ("float32 or bfloat16", lambda x: x in ("float32", "bfloat16")),
    "seed": (f"in 0 .. {settings.MAX_SEED}", lambda x: 0 <= x <= settings.MAX_SEED),
    "num_samples": (f"in {FEWEST} .. {MOST}", lambda x: FEWEST <= x <= MOST),
    "bootstrap": (
        f"0 or in 2 .. {MOST_RESAMPLES}",  # one number has no deviation
        lambda x: x == 0 or 2 <= x <= MOST_RESAMPLES,
    ),
}
EXISTING = ("weights", "seed", "vae", "preset")  # and sampling: mean nothing for images that exist


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
        given = content["arguments"]
        if unknown := given.keys() - {each.name for each in dataclasses.fields(cls)}:
            raise UserError(f"receipt must be of known arguments, got {min(unknown)} in {path}")
        if "samples" not in given:
            raise UserError(f"receipt must have arguments.samples, got {path} without it")
        return cls(**given)

    @property
    def is_plain(self):
        """Whether it asks for no more than the judgments of digits, which take no other option."""
        asked = (self.inception, self.reference, self.preset, self.num_samples, self.fid_infinity)
        return not any(asked) and not self.sampling and self.bootstrap is None

    def check(self):
        """UserError for what is wrong and can be found without jax."""
        self._check_values()
        settings.read_topic(settings.Sampling, self.sampling)
        if self.preset:
            presets.find(self.preset)
        is_model = is_checkpoint(self.samples)
        known = fields.look(self.samples) if is_model else None
        if self.vae:
            fields.check_vae(self.vae, known)
        if not (is_model or disk.path(self.samples).is_dir()):
            self._open_images()
        given = [*self.sampling, *filter(self._differs, EXISTING)]
        if given and not is_model:
            raise UserError(f"{given[0]} must not be given for images that exist: {self.samples}")
        if self.inception and not self.reference:
            raise UserError("--reference must be given with --inception: an .npz of ADM's format")
        needs = {"reference": self.reference, "preset": self.preset}
        needs = [f"--{name}" for name, value in needs.items() if value]
        needs += [] if is_model else [f"images that exist: {self.samples} has no saved step"]
        if needs and not self.inception:
            raise UserError(f"--inception must be given with {needs[0]}")
        if self.inception:
            peek.meta_of(self.inception, of="inception", name="inception")
        if known:
            self._check_model(known)
        if not is_model:
            self._check_images()

    def _check_values(self):
        """UserError for a field of another type or out of its range, as a receipt may have."""
        for each in dataclasses.fields(self):
            name, value = each.name, getattr(self, each.name)
            kind = (*typing.get_args(each.type), each.type)[0]
            if value is None and each.default is None:
                continue
            if type(value) is not kind:
                raise UserError(f"{name} must be {WORDS[kind]}, got {value!r}")
            rule, fits = RULES.get(name, ("", lambda x: True))
            if not fits(value):
                raise UserError(f"{name} must be {rule}, got {value!r}")

    def _open_images(self):
        from dit_jax.evals import samples  # needs NumPy and Pillow

        return samples.open_images(self.samples)

    def _check_images(self):
        """UserError for images that exist and cannot be judged, or a reference of another size."""
        images = self._open_images()
        if len(images) < FEWEST:
            raise UserError(
                f"samples must be at least {FEWEST} images, got {len(images)} in {self.samples}"
            )
        if (self.num_samples or 0) > len(images):
            raise UserError(
                f"num_samples must be at most {len(images)}, which are in {self.samples}, got "
                f"{self.num_samples}"
            )
        self._check_reference(images.shape)

    def _check_reference(self, shape):
        """UserError for a reference whose images have another shape than (H, W, C)."""
        from dit_jax.evals import samples

        samples.open_reference(self.reference, shape)

    def _check_model(self, known):
        """UserError if options or reference do not fit the model of a `sampling.fields.Known`."""
        if known.settings.data.space != "pixels" and not self.vae:
            raise UserError("--vae must be given for a model of latents, to decode its samples")
        preset = presets.find(self.preset).sampling if self.preset else {}
        fields.check_options(known, preset | self.sampling)
        if self.inception and known.settings.data.space == "pixels":
            self._check_reference((*known.model.input_size[:2], 3))

    def _differs(self, name):
        default = {each.name: each.default for each in dataclasses.fields(self)}
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
