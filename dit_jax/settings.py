"""Typed settings of a run, with defaults: what a config or the meta of a checkpoint is read into.

To add a field, add it here with the value that every run had before it existed, and to
configs/base.py with its explanation. Runs and checkpoints that lack the field then still open.
"""

import dataclasses
import difflib
import math
import re
from dataclasses import dataclass

from dit_jax import rules
from dit_jax.errors import UserError

SAMPLERS = ("ddpm", "ddim", "euler", "heun", "sde", "dpm2m", "unipc")  # as diffusion.solvers
SPACINGS = ("auto", "linspace", "leading", "trailing", "log_snr")  # as diffusion.spacings
SDE_NOISES = ("sigma", "sbdm", "constant", "linear", "decreasing", "increasing_decreasing")
CACHE_FITS = ("taylor", "chebyshev")  # as diffusion.forecasts
CFG_SCHEDULES = ("constant", "linear", "cosine")  # as diffusion.guidance, which needs jax
PROCESSES = ("ddpm", "linear", "gvp", "mean_flow", "improved_mean_flow")  # as diffusion.fields
WEIGHTS = ("constant", "min_snr", "soft_min_snr", "p2", "velocity")  # as diffusion.losses
OPTIMIZERS = ("adamw", "muon")  # as train.optimizer, which needs jax
LOGGERS = ("tensorboard", "wandb")  # as runs.loggers
# What may differ when a run is resumed: nothing of it changes what is learned.
FREE = (
    *("mesh", "run", "sampling", "compute.attention", "compute.remat", "compute.unroll"),
    "data.cache",
)
MAX_SEED = 2**32 - 1
SPACING = re.compile("(ddim)?[0-9]{1,9}")
SPACING_RULE = 'a whole number, as "250", or "ddim50"'
NUM_STEPS = re.compile(SPACING.pattern + r"|[0-9]{1,9}(\.[0-9]+)?(,[0-9]{1,9}(\.[0-9]+)?)+")
NUM_STEPS_RULE = f'{SPACING_RULE}, or times, as "999,600,300"'
MOVABLE = ("data.path", "data.vae")  # may differ if they hold the same: `runs.moved` compares


@dataclass(frozen=True)
class Model:
    """The architecture; `models.dit.configure` checks that the fields fit together."""

    size: str = "XL"
    depth: int = rules.at_least(0, 0)
    patch_size: int = 2
    input_size: tuple = (32, 32)
    in_channels: int = 4
    num_classes: int = 1000
    null_label: bool = True
    learn_sigma: bool = rules.by_process(True)
    conditioning: str = "adaln_zero"
    conditions: tuple = rules.by_process(("t", "y"), names=True)
    velocity_head: bool = False
    norm: str = "layer"
    mlp: str = "gelu"
    position: str = "sincos"
    qk_norm: bool = False
    bottleneck: int = rules.at_least(0, 0)
    class_tokens: int = rules.at_least(0, 0)
    class_tokens_from: int = rules.at_least(0, 0)
    head_depth: int = rules.at_least(0, 0)

    @property
    def name(self):
        """Size and patch, such as "XL/2", and the number of blocks if it is given."""
        return f"{self.size}/{self.patch_size}" + (f" of {self.depth} blocks" if self.depth else "")


@dataclass(frozen=True)
class Compute:
    """How to compute with the model: options of `models.dit.make_apply`."""

    dtype: str = "bfloat16"
    attention: str = "auto"
    remat: str = "none"
    unroll: bool = False


@dataclass(frozen=True)
class Mesh:
    """The mesh of devices: see `machine.sharding.make_mesh`."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    shard_optimizer: bool = True


@dataclass(frozen=True)
class Diffusion:
    """The process and what is learned of it: see `diffusion.processes` and `diffusion.fields`."""

    schedule: str = "linear"
    num_steps: int = 1000
    prediction: str = rules.one_of(("auto", "noise", "velocity", "v", "x0"), "auto")
    process: str = rules.one_of(PROCESSES, "ddpm")
    time: str = rules.one_of(("uniform", "logit_normal"), "uniform")
    time_mean: float = 0.0
    time_std: float = rules.above(0, 1.0)
    stratified: bool = False
    shift: float = rules.above(0, 1.0)
    time_scale: float = rules.above(0, 1000.0, by_process=True)
    reverse_time: bool = False
    weight: str = rules.one_of(WEIGHTS, "constant")
    weight_gamma: float = rules.at_least(0, 0.0)
    same_times: float = rules.share(0.75)
    uniform_times: float = rules.share(0.0)
    adaptive_power: float = rules.at_least(0, 1.0)
    adaptive_eps: float = rules.above(0, 0.01)
    omega: float = rules.above(0, 1.0)
    kappa: float = rules.fraction(0.5)
    omega_interval: tuple = rules.interval((0, 1))
    omega_max: float = rules.above(1, 8.0)
    omega_decay: float = rules.at_least(0, 1.0)
    noise_scale: float = rules.above(0, 1.0)

    def __post_init__(self):
        if self.prediction == "auto":  # so that every Diffusion says what it predicts
            usual = "noise" if self.process == "ddpm" else "velocity"
            object.__setattr__(self, "prediction", usual)


# What SiT's checkpoints were trained with, https://github.com/willisma/SiT.
SIT = {"process": "linear", "prediction": "velocity", "time_scale": 1.0, "reverse_time": True}


@dataclass(frozen=True)
class Data:
    """Where examples come from: see `data.feed`."""

    source: str = "images"
    space: str = rules.one_of(("pixels", "latents"), "latents")
    path: str = ""
    cache: str = ""
    split: str = "train"
    classes: tuple = rules.tuple_of(
        "whole numbers of at least 0", lambda x: type(x) is int and x >= 0
    )
    flip: bool = True
    vae: str = ""
    vae_dtype: str = rules.one_of(("float32", "bfloat16"), "float32")


@dataclass(frozen=True)
class Train:
    """The optimizer, its batches and its averages."""

    batch_size: int = rules.at_least(1, 256)
    accumulation_steps: int = rules.at_least(1, 1)
    class_dropout_prob: float = rules.fraction(0.1)
    optimizer: str = rules.one_of(OPTIMIZERS, "adamw")
    learning_rate: float = rules.above(0, 1e-4)
    b1: float = rules.fraction(0.9)
    b2: float = rules.fraction(0.999)
    eps: float = rules.above(0, 1e-8)
    weight_decay: float = rules.at_least(0, 0.0)
    clip_norm: float = rules.at_least(0, 0.0)
    warmup_steps: int = rules.steps(0, 0)
    decay_steps: int = rules.steps(0, 0)
    ema_decay: float = rules.fraction(0.9999)
    ema_warmup: bool = False
    ema_snapshot_every: int = rules.steps(0, 0)
    ema_widths: tuple = rules.widths((0.05, 0.1))
    frozen: tuple = rules.tuple_of("regular expressions", rules.is_pattern)
    route_share: float = rules.fraction(0.0)
    route_blocks: tuple = rules.blocks()

    @property
    def averages(self):
        """The widths of the power-function averages that the run tracks; () if it tracks none."""
        return self.ema_widths if self.ema_snapshot_every else ()


@dataclass(frozen=True)
class Sampling:
    """How samples are drawn unless a caller says otherwise: see `sampling.generate`."""

    sampler: str = rules.one_of(SAMPLERS, "ddpm")
    num_steps: str = rules.keeps(NUM_STEPS_RULE, NUM_STEPS.fullmatch, "250")
    spacing: str = rules.one_of(SPACINGS, "auto")
    shift: float = rules.at_least(0, 0.0)
    eta: float = rules.share(0.0)
    sde_noise: str = rules.one_of(SDE_NOISES, "sigma")
    sde_last: float = rules.fraction(0.04)
    clip_x0: bool = False
    cfg_scale: float = rules.at_least(0, 1.5)
    cfg_schedule: str = rules.one_of(CFG_SCHEDULES, "constant")
    cfg_channels: int = rules.at_least(0, 3)
    cfg_interval: tuple = rules.interval((0, 999))
    omega: float = rules.at_least(1, 1.0)
    omega_interval: tuple = rules.interval((0, 1))
    cache: str = rules.schedule()
    cache_guidance: str = rules.schedule()
    cache_order: int = rules.keeps("in 0 .. 3", lambda x: 0 <= x <= 3, 1)
    cache_fit: str = rules.one_of(CACHE_FITS, "taylor")


@dataclass(frozen=True)
class Run:
    """How long a run takes, and what it writes."""

    total_steps: int = rules.steps(1, 400_000)
    log_every: int = rules.at_least(1, 100)
    checkpoint_every: int = rules.at_least(1, 5_000)
    keep_checkpoints: int = rules.at_least(1, 2)
    keep_best: int = rules.at_least(0, 0)
    keep_best_by: str = rules.one_of(("loss", "score"), "loss")
    verify_checkpoints: bool = True
    max_rollbacks: int = rules.at_least(0, 0)
    spike_factor: float = rules.keeps("0 or above 1", lambda x: x == 0 or x > 1, 0.0)
    sample_every: int = rules.at_least(1, 10_000)
    num_samples: int = rules.at_least(1, 16)
    score_every: int = rules.at_least(0, 0)
    score_samples: int = rules.at_least(2, 500)
    loggers: tuple = rules.names(LOGGERS)


@dataclass(frozen=True)
class Settings:
    """All settings of a run, by topic."""

    seed: int = rules.keeps(f"in 0 .. {MAX_SEED}", lambda x: 0 <= x <= MAX_SEED, 0)
    model: Model = Model()
    compute: Compute = Compute()
    mesh: Mesh = Mesh()
    diffusion: Diffusion = Diffusion()
    data: Data = Data()
    train: Train = Train()
    sampling: Sampling = Sampling()
    run: Run = Run()


def read(fields):
    """The Settings of a nested dict, as a config or a JSON file has it; absent fields get defaults.

    UserError for a field that does not exist, is of another type, or is out of its range.
    """
    settings = rules.fit_process(_read(Settings, fields, ""), fields)
    if settings.train.class_dropout_prob and not settings.model.null_label:
        raise UserError(
            "train.class_dropout_prob must be 0 without model.null_label, "
            f"got {settings.train.class_dropout_prob}"
        )
    rules.check_averages(settings.train, usual=Train.ema_widths)
    rules.check_best(settings.run)
    return settings


def check_mesh(**sizes):
    """UserError if the sizes of the axes of a mesh, by name, cannot fit any number of devices."""
    for name, size in sizes.items():
        if size < 1 and size != -1:
            raise UserError(f"mesh.{name} must be at least 1, or -1 for the rest, got {size}")
    if (rests := list(sizes.values()).count(-1)) > 1:
        raise UserError(f"only one axis of mesh may be -1, got {rests} of {len(sizes)}")


def check_width(name, width):
    """UserError if a power-function average cannot have this width: see `train.power_ema`."""
    if not rules.is_width(width):
        raise UserError(f"{name} must be {rules.WIDTH}, got {width}")


def check_decay(warmup_steps, decay_steps):
    """UserError if the learning rate would fall before it has risen."""
    if decay_steps and decay_steps <= warmup_steps:
        raise UserError(
            f"decay_steps must be 0 or above warmup_steps {warmup_steps}, got {decay_steps}"
        )


def defaults():
    """{TOPIC.FIELD: its default} of all fields, in their order."""
    return flat(Settings())


def flat(settings):
    """{TOPIC.FIELD: its value} of all fields of Settings, in their order."""
    found = {}
    for name, value in vars(settings).items():
        if dataclasses.is_dataclass(value):
            found |= {f"{name}.{field}": each for field, each in vars(value).items()}
        else:
            found[name] = value
    return found


def replace(settings, changes):
    """Settings with other values: {TOPIC.FIELD: value}."""
    for name, value in changes.items():
        topic, field = name.split(".")
        changed = dataclasses.replace(getattr(settings, topic), **{field: value})
        settings = dataclasses.replace(settings, **{topic: changed})
    return settings


def rule(name):
    """The rule that the value of TOPIC.FIELD keeps, in words; "" if its type says it."""
    topic, _, field = name.rpartition(".")
    kind = type(getattr(Settings(), topic)) if topic else Settings
    (declared,) = (each for each in dataclasses.fields(kind) if each.name == field)
    return declared.metadata.get("rule", ("", None))[0]


def nearest(name):
    """The fields, as TOPIC.FIELD, that may be meant by a name with a wrong topic or spelling."""
    topic, _, field = name.rpartition(".")
    if short := [each for each in defaults() if _initials(each) == field and len(field) > 1]:
        return short[:3]
    scores = {}
    for each in defaults():
        scores[each] = difflib.SequenceMatcher(None, field, each.rpartition(".")[2]).ratio()
    best = max(scores.values())
    if best < 0.6 or len(field) < 3:
        return []
    found = [
        each for each, score in scores.items() if score == 1 or best < 1 and score > best - 0.1
    ]
    same = [each for each in found if topic and each.startswith(f"{topic}.")]
    return sorted(same or found, key=scores.get, reverse=True)[:3]


def _initials(name):
    """lr of train.learning_rate."""
    return "".join(word[:1] for word in name.rpartition(".")[2].split("_"))


def read_topic(kind, fields):
    """One topic, as Sampling, of a dict of its fields; UserError as `read`."""
    return _read(kind, fields, "")


def _read(kind, fields, topic):
    """A dataclass of a dict of its fields; topic: its name with a dot, for messages."""
    if not isinstance(fields, dict):
        raise UserError(f"{topic.removesuffix('.') or 'config'} must be a topic, got {fields!r}")
    declared = {each.name: each for each in dataclasses.fields(kind)}
    if kind is Diffusion and fields.get("prediction") == "velocity" and "process" not in fields:
        fields = SIT | fields  # a SiT that was converted when there were no paths
    for name in fields.keys() - declared.keys():
        near = nearest(f"{topic}{name}") or difflib.get_close_matches(name, declared, 1)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise UserError(f"there is no field {topic}{name}{hint}")
    values = {}
    for name, value in fields.items():
        if value is None and topic and declared[name].metadata.get("by_process"):
            continue
        if dataclasses.is_dataclass(declared[name].type):
            values[name] = _read(declared[name].type, value, f"{name}.")
        else:
            values[name] = _convert(f"{topic}{name}", value, declared[name])
    return kind(**values)


def _convert(name, value, declared):
    """A field's value in its type, checked."""
    kind = declared.type
    if kind is tuple and isinstance(value, list):
        value = tuple(value)
    if declared.metadata.get("names"):
        value = rules.split(value)
    if kind is float and type(value) is int:
        value = float(value)
    if kind is str and type(value) is int:  # num_steps: 250 stands for "250"
        value = str(value)
    if type(value) is not kind:
        rule = declared.metadata.get("rule", ("text",))[0]
        words = {str: rule, int: "a whole number", float: "a number", bool: "true or false"}
        wanted = words.get(kind, "a list")
        raise UserError(f"{name} must be {wanted}, got {value!r}")
    if kind is float and not math.isfinite(value):
        raise UserError(f"{name} must be finite, got {value}")
    rule, fits = declared.metadata.get("rule", ("", lambda x: True))
    if not fits(value):
        raise UserError(f"{name} must be {rule}, got {value!r}")
    return value


def to_json(settings):
    """Settings, or one topic of them, as plain JSON values."""
    return _lists(dataclasses.asdict(settings))


def _lists(value):
    if isinstance(value, dict):
        return {name: _lists(each) for name, each in value.items()}
    return list(value) if isinstance(value, tuple) else value


def differences(old, new):
    """[(name, old value, new value)] of the fields in which two Settings differ and must not."""
    found = []
    for topic, before in vars(old).items():
        after = getattr(new, topic)
        if not dataclasses.is_dataclass(before):
            found += [(topic, before, after)]
        elif topic not in FREE:
            found += [(f"{topic}.{k}", x, getattr(after, k)) for k, x in vars(before).items()]
    found = [each for each in found if each[0] not in FREE + MOVABLE and each[1] != each[2]]
    # Other fields follow from the process.
    return sorted(found, key=lambda each: each[0] != "diffusion.process")
