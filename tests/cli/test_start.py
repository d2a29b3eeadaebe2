"""How commands start: --help and a wrong flag are answered before anything large is imported."""

import glob
import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import random_run
import small_run

from dit_jax import settings
from dit_jax.cli import encode
from dit_jax.data import feed, fields, latents
from dit_jax.diffusion import solvers
from dit_jax.models import attention, blocks, layers, vae
from dit_jax.models import fields as model_fields
from dit_jax.sampling import autoencoder

ROOT = Path(__file__).parents[2]
CLI = ROOT / "dit_jax" / "cli"
COMMANDS = sorted(path.stem for path in CLI.glob("*.py") if "def entry" in path.read_text())
LARGE = {"jax", "numpy", "flax", "optax", "orbax", "grain", "torch", "sklearn", "scipy", "PIL"}


def start(name, *words):
    """(exit code, stdout, stderr, seconds of CPU) of a command in another process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", f"dit_jax.cli.{name}", *words], capture_output=True, text=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return done.returncode, done.stdout, done.stderr, seconds


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_imports_its_work_after_the_flags(name):
    code = f"import sys, dit_jax.cli.{name}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not LARGE & {module.split(".")[0] for module in done.stdout.split()}


@pytest.mark.parametrize("name", COMMANDS)
def test_help_and_a_typo_are_answered_within_a_second(name):
    code, out, errors, seconds = start(name, "--help")
    assert (code, errors) == (0, "") and "dit-" in out
    assert seconds < 1
    code, out, errors, seconds = start(name, "--no_such_flag=1")
    assert (code, out) == (2, "") and "there is no flag --no_such_flag; --help lists" in errors
    assert seconds < 1


@pytest.mark.parametrize(
    "name, words, message",
    [
        (
            "train",
            ["configs/digits.py", "{new}", "--init_from=/nowhere"],
            "init_from must be a run",
        ),
        ("train", ["xl/2", "{new}"], "data.path must be given"),
        ("train", ["xl/2", "{new}", "--config.data.path=/nowhere"], "data.vae must be given"),
        (
            "train",
            ["xl/2", "{new}", "--config.data.path=/nowhere", "--config.data.vae=/nowhere"],
            "data.path must exist, got /nowhere",
        ),
        (
            "train",
            ["xl/2", "{new}", "--config.data.path=/tmp", "--config.data.vae=/nowhere"],
            "data.vae must be a folder that `dit-convert vae` wrote, got /nowhere",
        ),
        ("train", ["xl/2", "{new}", "--config.sampling.eta=2"], "sampling.eta must be in 0 .. 1, "),
        ("bench", ["data", "xl/2", "--config.data.source=none"], "data.source must be one of"),
        (
            "bench",
            ["fly", "xl/2"],
            "the first word must be one of train, sample, operations, data, encode, decode, start, "
            "got 'fly'",
        ),
        ("plan", ["xl/2", "--topology=v9:4"], "topology must be a generation and the chips"),
        (
            "sample",
            ["/nowhere", "--labels=1", "--seed=-1"],
            "--seed must be a whole number in 0 ..",
        ),
        ("sample", ["/nowhere", "--labels=3,,x-"], "labels must have a label on both sides of a"),
        ("sample", ["/nowhere", "--labels=9-0"], "labels must have ranges that go up, as 0-9"),
        (
            "sample",
            ["/nowhere", "--labels=1", "--num_steps=ten"],
            "num_steps must be a whole number, as",
        ),
        ("sample", ["/nowhere", "--labels=1", "--cfg_interval=5,4"], "two numbers, first <= last"),
        ("sample", ["/nowhere", "--labels=1", "--cfg_interval=5,x"], "two numbers, as 0,500, got"),
        ("sample", ["/nowhere", "--labels_file=/nowhere"], "labels_file must be a file that exist"),
        ("sample", ["/nowhere", "--labels=1"], "checkpoint must be a directory with a saved step"),
        ("evaluate", ["/nowhere"], "checkpoint must be a directory with a saved step"),
        ("evaluate", ["/nowhere", "--seed=4294967296"], "--seed must be a whole number in 0 .. 42"),
        ("encode", ["/nowhere", "{new}", "--vae=/nowhere"], "DATASET must exist, got /nowhere"),
        (
            "encode",
            ["/tmp", "{new}", "--vae=/nowhere"],
            "vae must be a folder that `dit-convert va",
        ),
        ("verify", ["/nowhere"], "PATH must exist, got /nowhere"),
        ("ema", ["/nowhere", "--width=0.1", "--out={new}"], "RUN must be a run with snapshots of"),
        ("ema", ["/nowhere", "--width=0.3", "--out={new}"], "width must be above 0 and below 0.2"),
        ("evaluate", ["--sweep=ema_width=0.3", "--out={new}", "/nowhere"], "ema_width must be ab"),
        ("report", ["/nowhere"], "WORKDIR must exist, got /nowhere"),
        ("report", ["/tmp", "--out=/tmp/x.pdf"], "out must end with .html, got /tmp/x.pdf"),
        ("runs", ["/nowhere"], "DIR must exist, got /nowhere"),
        ("prepare", ["/nowhere", "{new}"], "SRC must exist, got /nowhere"),
        ("convert", ["from-torch", "/nowhere.pt", "{new}"], "FILE must exist, got /nowhere.pt"),
        ("convert", ["from-diffusers", "/nowhere", "{new}"], "DIR must exist, got /nowhere"),
        ("convert", ["to-torch", "/nowhere", "{new}.pt"], "checkpoint must be a directory with a"),
        ("convert", ["vae", "/nowhere", "{new}"], "DIR_OR_FILE must exist, got /nowhere"),
        ("convert", ["vae", "/tmp", "{new}.pt"], "output must be a folder name without .pt, got"),
        ("convert", ["vae", "/tmp", "/no/where"], "output must be in an existing directory, got"),
        (
            "convert",
            ["push", "/nowhere", "a/b"],
            "checkpoint must be a directory with a saved step",
        ),
        ("convert", ["pull", "a", "{new}"], "REPO must be NAMESPACE/NAME of the Hugging Face hub"),
        ("convert", ["inspect", "/nowhere"], "FILE_OR_DIR must exist, got /nowhere"),
    ],
)
def test_a_mistake_is_told_before_jax_is_imported(tmp_path, name, words, message):
    words = [word.replace("{new}", str(tmp_path / "new")) for word in words]
    code = (
        f"import sys\nfrom dit_jax.cli import {name}\nsys.argv[0] = 'dit-{name}'\n"
        f"try:\n    {name}.entry()\n"
        "except SystemExit as end:\n    print(end.code, 'jax' in sys.modules)"
    )
    kept = {k: v for k, v in os.environ.items() if not k.startswith("XLA_")}
    done = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True, env=kept
    )
    assert done.stdout == "2 False\n", done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"dit-{name}: ") and message in line
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A run, one of latents, two vaes, a data set and folders that are none of these."""
    root = tmp_path_factory.mktemp("places")
    random_run.save(root / "run", class_names=["a b", "red circle", *"cdefghij"])
    other = random_run.CONFIG | {"data": {"source": "images", "space": "latents"}}
    random_run.save(root / "latents", other)
    for name, channels in ("vae", 1), ("wide", 2):
        config = vae.VAEConfig(
            channels=(8, 8), latent_channels=channels, num_resnets=1, num_groups=4
        )
        autoencoder.save(root / name, config, random_run.weights(vae.init, config))
    (root / "data").mkdir()
    (root / "data/dataset_info.json").write_text('{"splits": [{"name": "train"}]}')
    (root / "foreign").mkdir()
    (root / "foreign/notes.txt").write_text("mine")
    (root / "started/.progress").mkdir(parents=True)
    plan = {"split": "train", "size": 64, "dtype": "float16", "examples_per_shard": 4096}
    (root / "started/.progress/plan.json").write_text(json.dumps(plan))
    (root / "started/latents.array_record-00000-of-00002").touch()  # else it may be replaced
    random_run.save(root / "trained")
    text = json.dumps(settings.to_json(settings.Settings()))
    (root / "trained/config.json").write_text(text)
    return root


SAMPLE = ("sample", "{at}/run", "{at}/new.png")
LATENTS = ("sample", "{at}/latents", "{at}/new.npz", "--labels=1")
ENCODE = ("encode", "{at}/data", "{at}/new", "--vae={at}/vae", "--size=32")
TRAIN = ("train", "configs/digits.py", "{at}/new")
EARLY = {  # a command with a mistake: what its line has
    (*SAMPLE, "--labels=red cirle"): "got 'red cirle'; did you mean red circle?",
    (*SAMPLE, "--labels=10"): "labels must be in 0 .. 9, got 10",
    (*SAMPLE, "--labels=1", "--num_steps=1"): "num_steps must be in 2 .. 1000, got '1'",
    (*SAMPLE, "--labels=1", "--cfg_channels=9"): "cfg_channels must be in 0 .. 1, got 9",
    (*SAMPLE, "--labels=1", "--cfg_interval=0,2000"): "first <= last in 0 .. 999, got ",
    (*SAMPLE, "--labels=1", "--sampler=ddpm", "--eta=0.5"): "eta must be left at 0 for ddpm",
    (*SAMPLE, "--labels=1", "--vae={at}/vae"): "vae must be none for a model of pixels, got",
    (*LATENTS, "--vae={at}/wide"): "vae must have 1 latent channels, got 2",
    (*LATENTS, "--vae={at}/run"): "vae must be a folder that `dit-convert vae` wrote, got",
    (*LATENTS, "--out={at}/x.png"): "out must be given once",
    ("sample", "{at}/latents", "{at}/x.png", "--labels=1"): "out must end with .npz for latents",
    (*SAMPLE, "--interpolate=a b"): "interpolate must be two classes or more, got a b",
    (*SAMPLE, "--labels=1", "--grid=num_steps=50,1"): "num_steps must be in 2 .. 1000, got '1'",
    (*SAMPLE, "--labels=1", "--grid=seed=0", "--num_samples=101"): "labels must be at most 100 for",
    (*LATENTS[:2], "{at}/x.gif", "--labels=1", "--trajectory"): "--vae must be given to show laten",
    ("sample", "{at}/vae", "{at}/x.png", "--labels=1"): "checkpoint must be one of a DiT, got",
    ("evaluate", "{at}/run", "--num_steps=1"): "num_steps must be in 2 .. 1000, got '1'",
    ("evaluate", "{at}/latents", "{at}/new"): "--vae must be given for a model of latents",
    ("evaluate", "{at}/run", "--vae={at}/vae"): "vae must be none for a model of pixels, got",
    (*ENCODE, "--size=33"): "size must be divisible by 2, got 33",
    (*ENCODE, "--split=test"): "split must be one of train, got 'test'",
    (*ENCODE, "--verify=2"): "OUT must be a finished directory of dit-encode, got",
    ("encode", "{at}/run", *ENCODE[2:]): "dataset must be a directory written by dit-prepare",
    ("encode", "{at}/data", "{at}/foreign", *ENCODE[3:]): "OUT must be new, empty or written by",
    ("encode", "{at}/data", "{at}/started", *ENCODE[3:]): "size must be 64, as in",
    ("encode", "{at}/data", "{at}/new", "--vae={at}/run"): "vae must be a folder that `dit-convert",
    (
        *TRAIN,
        "--config.model.size=N",
    ): "model.size must be one of Pi, Na, Ti, XS, S, B, M, L, XL, H, G, got",
    ("train", "configs/digits.py:Ti/3", "{at}/new"): "model.input_size must be divisible by patch",
    ("train", "xl/3", "{at}/new"): "model.input_size must be divisible by patch_size 3",
    (*TRAIN, "--config.model.input_size=(9, 8)"): "model.input_size must be divisible by patch",
    (*TRAIN, "--config.model.conditioning=x"): "model.conditioning must be one of in_context, ",
    (*TRAIN, "--config.compute.dtype=int8"): "compute.dtype must be one of float32, bfloat16, got",
    (*TRAIN, "--config.compute.remat=some"): "compute.remat must be one of none, dots, full, got",
    (*TRAIN, "--config.compute.attention=x"): "compute.attention must be one of auto, xla, cudnn",
    (*TRAIN, "--config.mesh.fsdp=0"): "mesh.fsdp must be at least 1, or -1 for the rest, got 0",
    (*TRAIN, "--config.mesh.fsdp=-1"): "only one axis of mesh may be -1, got 2 of 3",
    (*TRAIN, "--config.mesh.tensor=5"): "mesh.tensor must divide the 4 heads of Ti, got 5",
    (*TRAIN, "--config.sampling.num_steps=5000"): "sampling.num_steps must be in 2 .. 1000, got",
    (*TRAIN, "--config.sampling.cfg_channels=2"): "sampling.cfg_channels must be in 0 .. 1, got 2",
    (*TRAIN, "--config.diffusion.schedule=x"): "diffusion.schedule must be one of linear, squared",
    (*TRAIN, "--picture={at}/x.png"): "picture must be left out without --dry_run, got",
    (*TRAIN, "--dry_run", "--picture={at}/x.jpg"): "picture must end with .png, got",
    (
        *TRAIN,
        "--config.run.loggers=mail",
    ): "run.loggers must be a list of tensorboard or wandb, got",
    (*TRAIN, "--config.train.decay_steps=1"): "train.decay_steps must be 0 or above warmup_steps",
    ("train", "configs/digits.py", "{at}/foreign/notes.txt"): "workdir must not be or lie under a",
    ("train", "configs/digits.py", "{at}/foreign"): "workdir must be new, empty or a run of dit-t",
    ("train", "configs/digits.py", "{at}/trained"): "workdir must not hold a run of another config",
    (*TRAIN, "--init_from={at}/vae"): "init_from must be a run of dit-train or a checkpoint of",
    ("report", "{at}/run", "{at}/foreign"): "WORKDIR must be a run of dit-train, got",
    ("bench", "train", "configs/digits.py", "--config.model.size=N"): "model.size must be one of",
    ("convert", "from-torch", "{at}/foreign/notes.txt", "{at}/new"): "file must end with .pt, .pth",
    (
        "verify",
        "{at}/foreign",
    ): "PATH must be a run, saved steps, an output of dit-prepare or dit-e",
    ("plan", "configs/digits.py", "--topology=v5e:2x2", "--config.mesh.data=0"): "mesh.data must",
}
CALLS = r"""
import contextlib, importlib, io, json, sys
for name, *words in json.load(sys.stdin):
    sys.argv = [f"dit-{name}", *words]
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            importlib.import_module(f"dit_jax.cli.{name}").entry()
    except SystemExit as end:
        print(json.dumps([end.code, errors.getvalue(), "jax" in sys.modules]))
"""


def test_what_a_checkpoint_or_the_settings_tell_is_told_before_jax_is_imported(places):
    cases = [[word.replace("{at}", str(places)) for word in words] for words in EARLY]
    before = sorted(places.rglob("*"))
    command = [sys.executable, "-c", CALLS]
    options = {"input": json.dumps(cases), "cwd": ROOT, "stdout": subprocess.PIPE, "text": True}
    done = subprocess.run(command, **options)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    for (name, *words), message, answer in zip(cases, EARLY.values(), answers, strict=True):
        code, errors, has_jax = answer
        assert (code, has_jax) == (2, False), (words, errors)
        assert errors.startswith(f"dit-{name}: ") and errors.count("\n") == 1, (words, errors)
        assert message in errors, (words, errors)
    assert sorted(places.rglob("*")) == before


def test_names_that_flags_offer_are_those_of_the_work():
    assert settings.SAMPLERS == tuple(solvers.SAMPLERS)
    assert encode.DTYPES == latents.DTYPES
    assert set(fields.SOURCES) == set(feed.FEEDS)
    assert model_fields.DESIGNS == tuple(blocks.BLOCKS)
    offered = [name for name in attention.ATTENTIONS if name != "xla_jvp"]  # of losses with a jvp
    tables = layers.DTYPES, offered, layers.REMAT_POLICIES
    assert list(model_fields.ARITHMETIC.values()) == list(map(tuple, tables))


def interrupt(name, workdir, *, after, signum=signal.SIGINT, delay=0.0):
    """(exit code, stderr) of a command that gets a signal after the import of this module."""
    words = [word.replace("{new}", str(workdir)) for word in WORDS[name]]
    command = [sys.executable, "-X", "importtime", "-m", f"dit_jax.cli.{name}", *words]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        kept, timer = [], threading.Timer(delay, process.send_signal, [signum])
        for line in process.stderr:
            if not line.startswith("import time:"):
                kept.append(line)
            elif line.split("|")[-1].strip() == after:
                timer.start()
        timer.cancel()
    return process.returncode, "".join(kept)


CONFIG = ["configs/digits.py:Ti/4", "--config.mesh.fsdp=3"]
ABSENT = "rocm" if glob.glob("/dev/accel*") else "tpu"  # devices that this machine lacks


@pytest.mark.parametrize(
    "variables, message",
    [
        ({"JAX_PLATFORMS": ABSENT}, "JAX_PLATFORMS must name devices that this machine has, and "),
        ({"JAX_PLATFORMS": "gpu"}, "JAX_PLATFORMS must name devices that this machine has, and "),
        ({"XLA_FLAGS": "--xla_none=1"}, "XLA_FLAGS must be flags that this XLA knows, got '--xla_"),
        (
            {"JAX_DEFAULT_MATMUL_PRECISION": "hightest"},
            "JAX_DEFAULT_MATMUL_PRECISION must be a value that jax knows, got 'hightest': ",
        ),
        ({"JAX_ENABLE_X64": "banana"}, "JAX_ENABLE_X64 must be a value that jax knows, got 'bana"),
        (  # jax names only the value
            {"JAX_TRACER_ERROR_NUM_TRACEBACK_FRAMES": "few"},
            "JAX_TRACER_ERROR_NUM_TRACEBACK_FRAMES must be a value that jax knows, got 'few': inv",
        ),
        ({}, "mesh must be of "),  # libtpu, which is installed, prints nothing
    ],
)
def test_an_environment_that_jax_cannot_use_is_one_line(tmp_path, variables, message):
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_", "TPU_"))}
    kept |= {"TF_CPP_MIN_LOG_LEVEL": "1", "CUDA_VISIBLE_DEVICES": ""} | variables
    command = [sys.executable, "-m", "dit_jax.cli.train", *CONFIG, tmp_path / "new"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=kept)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = (line for line in done.stderr.splitlines() if not small_run.NOISE.search(line))
    assert line.startswith(f"dit-train: {message}")
    assert not (tmp_path / "new").exists()


WORDS = {
    "train": ["configs/digits.py:Ti/4", "{new}", "--config.train.batch_size=16"],
    "sample": ["{new}", "--labels=1"],
    "convert": ["inspect", "README.md"],
    "bench": ["data", "configs/digits.py"],
}


@pytest.mark.parametrize(
    "name, after, signum",
    [
        ("train", "dit_jax.cli", signal.SIGINT),
        ("train", "dit_jax.cli", signal.SIGTERM),
        ("bench", "absl.flags", signal.SIGINT),
        ("sample", "dit_jax.cli.command", signal.SIGINT),
        ("train", "numpy", signal.SIGINT),
        ("convert", "jax._src.api", signal.SIGINT),
        ("train", "orbax.checkpoint", signal.SIGTERM),
    ],
)
def test_a_signal_during_an_import_is_one_line(tmp_path, name, after, signum):
    code, errors = interrupt(name, tmp_path / "new", after=after, signum=signum)
    assert_interrupted(name, code, errors)


def assert_interrupted(name, code, errors):
    rest = " with nothing new to save: start the same command again" if name == "train" else ""
    assert errors == f"dit-{name}: interrupted{rest}\n"
    assert code == (42 if name == "train" else 130)


LONG = WORDS | {  # {run} has a checkpoint
    "sample": ["{run}", "{new}.png", "--labels=all", "--num_samples=2000"],
    "convert": ["to-torch", "{run}", "{new}.pt"],
}


def test_ctrl_c_during_a_conversion_leaves_nothing(tmp_path, monkeypatch):
    """When XLA and PyTorch have threads, and the temporary output exists."""
    random_run.save(tmp_path / "run")
    monkeypatch.setitem(WORDS, "convert", ["to-torch", str(tmp_path / "run"), "{new}.pt"])
    (tmp_path / "out").mkdir()
    code, errors = interrupt(
        "convert", tmp_path / "out" / "x", after="torch.serialization", delay=1
    )
    assert (code, errors.splitlines()[-1]) == (130, "dit-convert: interrupted")
    assert list((tmp_path / "out").iterdir()) == []


LATE = """
import os, signal
from dit_jax.cli import interrupt

class Last:  # Python deletes it after its own handling of signals has ended
    def __del__(self, kill=os.kill, process=os.getpid(), signum=signal.SIGINT):
        kill(process, signum)

last = Last()
"""


def test_ctrl_c_after_the_last_line_changes_nothing(tmp_path):
    (tmp_path / "dit-late").write_text(LATE)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, tmp_path / "dit-late"]
    done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
@pytest.mark.parametrize("name", list(LONG))
def test_ctrl_c_at_any_moment_is_one_line(tmp_path, monkeypatch, name):
    random_run.save(tmp_path / "run")
    words = [word.replace("{run}", str(tmp_path / "run")) for word in LONG[name]]
    monkeypatch.setitem(WORDS, name, words)
    for i in range(24):
        workdir = tmp_path / str(i)
        code, errors = interrupt(name, workdir, after="dit_jax.cli", delay=0.25 * i)
        assert not list(tmp_path.glob(".partial*")), i
        assert "Traceback" not in errors and "Exception ignored" not in errors, (i, errors)
        if code in (42, 130):
            last = errors.splitlines()[-1]
            assert re.search("interrupted|stopped after step .* is saved", last), (i, errors)
        else:  # it had ended before
            assert code in (0, 2), (i, errors)
