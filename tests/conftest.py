"""Sets up jax for all tests, and provides fixtures that several rooms use.

Tests run on eight CPU devices, without implicit promotion of ranks or types. At the end pytest
prints the largest errors relative to the golden numbers of the official PyTorch code.
"""

import functools
import os
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

import bucket
import hub_server
import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from testdata import evaluation, weights

from dit_jax.convert import torch_dit, torch_inception
from dit_jax.machine import disk
from dit_jax.models import dit, inception
from dit_jax.sampling import extractor

jax.config.update("jax_platforms", "cpu")
os.environ["JAX_PLATFORMS"] = "cpu"  # for commands in other processes
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

ROOT = Path(__file__).parents[1]
TESTDATA = Path(__file__).parent / "testdata"
ERRORS = []  # (name, largest error relative to the largest value, bound)


class Model(NamedTuple):
    """A DiT with the deterministic weights of `testdata/weights.py`."""

    config: dit.DiTConfig
    params: Any
    apply: Any  # jitted: apply(params, x, t, y)


def official_weights(config):
    """The official state dict with the deterministic weights."""
    shapes = jax.eval_shape(lambda: dit.init(config, jax.random.key(0)))
    empty = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes)
    return {
        name: x if name == "pos_embed" else np.float32(weights.tensor(name, x.shape))
        for name, x in torch_dit.to_official(empty, config).items()
    }


@pytest.fixture(scope="session")
def make_model():
    """make_model(config) -> Model, in float32."""

    @functools.cache
    def make(config):
        params = torch_dit.from_official(official_weights(config), config)
        return Model(
            config, jax.tree.map(jax.numpy.asarray, params), jax.jit(dit.make_apply(config))
        )

    return make


@pytest.fixture
def call(monkeypatch, capsys):
    """call(command module, *flags) -> exit code, stdout, stderr; runs it here, from the root."""

    def run(module, *args):
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", ["command", *map(str, args)])
        with pytest.raises(SystemExit) as stopped:
            module.entry()
        return stopped.value.code or 0, *capsys.readouterr()

    return run


@pytest.fixture(scope="session")
def golden():
    """The numbers of `testdata/golden.npz`, images as (N, H, W, C)."""
    with np.load(TESTDATA / "golden.npz") as file:
        arrays = dict(file)
    return {k: x.transpose(0, 2, 3, 1) if x.ndim == 4 else x for k, x in arrays.items()}


@pytest.fixture(scope="session")
def golden_eval():
    """The numbers of `testdata/golden_eval.npz`, which `testdata/evaluation.py` describes."""
    with np.load(TESTDATA / "golden_eval.npz") as file:
        return dict(file)


@pytest.fixture(scope="session")
def inception_weights():
    """The state dict of an Inception with the weights of `testdata/evaluation.py`."""
    return evaluation.weights(torch_inception.shapes())


@pytest.fixture(scope="session")
def inception_path(inception_weights, tmp_path_factory):
    """A checkpoint of that Inception, which counts as the published one."""
    path = tmp_path_factory.mktemp("inception") / "checkpoint"
    params = torch_inception.from_torch(inception_weights)
    extractor.save(path, params, sha256="abc", published=True)
    return path


@pytest.fixture(scope="session")
def look(inception_weights):
    """look(uint8 images) -> Features, {stage: mean over H and W}; compiled once for all sizes."""
    params = jax.device_put(torch_inception.from_torch(inception_weights))
    resize = jax.jit(inception.resize)

    @jax.jit
    def run(params, x):
        net = inception.bind(params)
        means = {name: y.mean(axis=(1, 2)) for name, y in net.stages(x)}
        return net(x), means

    def look(images):
        chunks = [images[i : i + 4] for i in range(0, len(images), 4)]
        outs = [run(params, resize(np.resize(x, (4, *x.shape[1:])))) for x in chunks]
        return jax.tree.map(lambda *x: np.concatenate(x)[: len(images)], *outs)

    return look


@pytest.fixture(scope="session")
def golden_batch():
    """x0, noise, t and y of the golden losses: sixteen steps, from the first to the last."""
    t = [0, 1, 2, 5, 10, 20, 50, 100, 200, 300, 400, 500, 700, 900, 998, 999]
    return {
        "x0": np.float32(0.8) * images("x0", 16),
        "noise": images("noise", 16),
        "t": np.array(t, np.int32),
        "y": np.arange(0, 66 * 16, 66, dtype=np.int32),
    }


@pytest.fixture(scope="session")
def golden_images():
    """golden_images(tag, N): deterministic latents of a tag, float32 (N, 32, 32, 4)."""
    return images


def images(tag, count):
    return weights.array(tag, (count, 4, 32, 32)).transpose(0, 2, 3, 1)


@pytest.fixture(scope="session")
def check_close():
    """check_close(name, actual, expected, bound): relative to the largest expected value."""

    def check(name, actual, expected, bound):
        actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
        assert actual.shape == expected.shape
        error = np.abs(actual - expected).max() / np.abs(expected).max()
        ERRORS.append((name, float(error), float(bound)))
        assert error <= bound  # false for NaN

    return check


@pytest.fixture(scope="session", autouse=True)
def compiled_once(tmp_path_factory):
    """Lets the processes that tests start share a compilation cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.mktemp("compiled")))
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
        patch.setenv("TF_CPP_MIN_LOG_LEVEL", "3")  # hides long lines of XLA about the cache
        yield


@pytest.fixture(scope="module")
def compilation_cache_in_this_process(compiled_once):
    """Lets this process use that cache too; without this fixture it has none."""
    jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    compilation_cache.reset_cache()  # it looks at the configuration once
    yield
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()


@pytest.fixture(scope="session")
def hub_and_address():
    with hub_server.serve() as found:
        yield found


@pytest.fixture
def hub(hub_and_address, monkeypatch, tmp_path_factory):
    """An empty hub_server.Hub, which huggingface_hub uses here with the token of alice."""
    hub, address = hub_and_address
    hub.clear()
    home = tmp_path_factory.mktemp("hub")
    monkeypatch.setenv("HF_ENDPOINT", address)
    monkeypatch.setenv("HF_TOKEN", "hf_alice")
    for name, value in {
        "HF_HUB_CACHE": str(home / "cache"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_HUB_DISABLE_XET": True,  # another protocol for large files
    }.items():
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value, raising=False)
    return hub


@pytest.fixture(scope="session")
def storage():
    """The bucket.Storage behind gs:// paths, in this process and in those that it starts."""
    with bucket.serve() as (storage, environment), pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        yield storage


@pytest.fixture
def bucket_path(storage, request):
    """A path in a bucket that no other test uses."""
    yield disk.path("gs://tests/" + re.sub(r"\W+", "-", request.node.name))
    storage.allow()


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):  # one of several workers (pytest -n)
        session.config.workeroutput["errors"] = ERRORS


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    ERRORS.extend(getattr(node, "workeroutput", {}).get("errors", []))


def pytest_terminal_summary(terminalreporter):
    if ERRORS:
        terminalreporter.section("largest errors relative to the golden numbers")
        for name, error, bound in sorted(ERRORS):
            terminalreporter.line(f"{name:<24} {error:8.1e} of {bound:.0e}")
