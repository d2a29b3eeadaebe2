"""dit-encode from end to end: the cache against encoding in the loop, interruptions, wrong use."""

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import full_disk
import jax
import numpy as np
import pictures
import processes
import pytest

from dit_jax.cli import encode, train, verify
from dit_jax.data import arrayrecord, feed, imagefolder, latents, loader, prepare, prepared
from dit_jax.machine import disk, sharding
from dit_jax.models import vae
from dit_jax.sampling import autoencoder

NARROW = vae.VAEConfig(
    channels=(8, 16, 16), num_resnets=1, num_groups=4, scale=(0.8,), shift=(0.1,)
)
COMMAND = [sys.executable, "-m", "dit_jax.cli.encode"]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with a prepared dataset of 24 images, `data`, two autoencoders, `vae` and `other`,
    and the `cache` that dit-encode wrote with `vae`.
    """
    path = tmp_path_factory.mktemp("encode")
    pictures.draw(path / "tree", per_class=8)
    subprocess.run(
        [sys.executable, "-m", "dit_jax.cli.prepare", path / "tree", path / "data"], check=True
    )
    init = jax.jit(vae.init, static_argnums=0)
    autoencoder.save(path / "vae", NARROW, init(NARROW, jax.random.key(0)))
    autoencoder.save(path / "other", NARROW, init(NARROW, jax.random.key(1)))
    options = ("--size=16", f"--vae={path}/vae", "--examples_per_shard=5")
    subprocess.run([*COMMAND, path / "data", path / "cache", *options], check=True)
    return path


def test_dit_verify_checks_a_cache(call, root, tmp_path):
    cache = shutil.copytree(root / "cache", tmp_path / "cache")
    assert call(verify, cache)[0] == 0
    shard = max(cache.glob("*array_record*"))
    shard.write_bytes(bytes(100))
    code, out, _ = call(verify, cache)
    assert code == 1 and f"DAMAGED: {shard} must have" in out


@pytest.mark.parametrize(
    "dtype, bound", [("float16", 5e-4), pytest.param("float32", 0, marks=pytest.mark.slow)]
)
def test_cache_matches_encoding_in_the_loop(call, root, tmp_path, dtype, bound):
    options = (f"--vae={root}/vae", "--size=16", f"--dtype={dtype}")
    assert call(encode, root / "data", tmp_path / "cache", *options)[0] == 0
    cache = latents.open_latents(tmp_path / "cache")
    source = prepared.open_images(root / "data", "train", 16)
    model = autoencoder.load(root / "vae")
    assert len(cache) == len(source) == 24 and cache.num_classes == 3
    assert cache.class_names == source.class_names == ("c0", "c1", "c2")
    for i in range(24):
        example, cached = source[i], cache[i]
        image = example["image"]
        expected = model.encode(np.stack([image, image[:, ::-1]]))
        assert cached["label"] == example["label"] and cached["moments"].dtype == np.float32
        # The two batch sizes compile to different float32 summation orders.
        slack = bound * np.abs(expected) + 2e-5 * np.abs(expected).max()
        assert (np.abs(cached["moments"] - expected) <= slack).all()


def take(config, count):
    """The first `count` training batches of a config."""
    data = feed.make(config)
    on_all = sharding.of_batch(sharding.make_mesh())
    batches = loader.batches(
        data.source, batch_size=8, seed=5, start=0, sharding=on_all, augment=data.augment
    )
    return [jax.device_get(data.prepare(batch)) for batch in itertools.islice(batches, count)]


def make_config(root, source):
    from configs import imagenet256

    config = imagenet256.get_config("Pi/2")
    config.model.input_size, config.model.num_classes = (4, 4), 3
    config.data.source = source
    config.data.path = str(root / ("cache" if source == "latents" else "data"))
    config.data.vae = str(root / "vae")
    return config


def test_training_batches_from_the_cache_match_those_from_the_images(root):
    """For three epochs: equal labels and flips, and posteriors up to the rounding of float16."""
    from_images = take(make_config(root, "images"), 9)
    from_cache = take(make_config(root, "latents"), 9)
    for one, two in zip(from_images, from_cache, strict=True):
        np.testing.assert_array_equal(one["label"], two["label"])
        bound = 2e-3 * np.abs(one["posterior"]).max()
        np.testing.assert_allclose(one["posterior"], two["posterior"], atol=bound)
    flat = [batch["posterior"].reshape(8, -1) for batch in from_cache]
    assert len(np.unique(np.concatenate(flat), axis=0)) > 24  # some of the 24 images are flipped


@pytest.mark.slow
def test_training_from_the_cache_decodes_samples(call, root, tmp_path):
    options = (
        *("--config=configs/imagenet256.py:Pi/2", "--config.model.input_size=(4, 4)"),
        *("--config.model.num_classes=3", "--config.train.batch_size=8"),
        *("--config.data.source=latents", f"--config.data.path={root}/cache"),
        *(f"--config.data.vae={root}/vae", "--config.run.total_steps=2"),
        *("--config.sampling.num_steps=3", "--config.run.num_samples=3"),
    )
    with jax.numpy_dtype_promotion("standard"):  # optax's Adam mixes dtypes
        code, _, errors = call(train, *options, f"--workdir={tmp_path}/run")
    assert code == 0, errors
    assert (tmp_path / "run" / "samples" / "0000002.png").is_file()


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_bytes_do_not_depend_on_the_number_of_processes(root, tmp_path, count):
    address = processes.free_address()
    options = (root / "data", tmp_path / "cache", "--size=16", f"--vae={root}/vae")
    options += ("--examples_per_shard=5",)
    workers = [
        subprocess.Popen(
            [*COMMAND, *options, *processes.flags(address, count, i)], env=processes.environment()
        )
        for i in range(count)
    ]
    assert [worker.wait(timeout=240) for worker in workers] == [0] * count
    assert contents(tmp_path / "cache") == contents(root / "cache")


@pytest.mark.slow
def test_resume_after_kill_9_writes_the_same_bytes(root, tmp_path):
    count = 5
    pictures.draw(tmp_path / "tree", per_class=40)
    prepare.write(tmp_path / "data", "train", imagefolder.scan(tmp_path / "tree"))
    options = ("--size=16", f"--vae={root}/vae", "--examples_per_shard=1")
    command = [*COMMAND, tmp_path / "data", tmp_path / "killed", *options]
    rng = random.Random(0)
    for _ in range(count):
        process = subprocess.Popen(command)
        done = count_notes(tmp_path / "killed") + rng.randint(1, 3)
        while process.poll() is None and count_notes(tmp_path / "killed") < done:
            time.sleep(0.0005)
        time.sleep(rng.uniform(0, 0.005))
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert count <= count_notes(tmp_path / "killed") < 120
    subprocess.run(command, check=True)
    subprocess.run([*COMMAND, tmp_path / "data", tmp_path / "undisturbed", *options], check=True)
    assert len(latents.read_manifest(tmp_path / "undisturbed")["shards"]) == 120
    assert contents(tmp_path / "killed") == contents(tmp_path / "undisturbed")


@pytest.mark.slow
def test_full_disk_prints_one_line_and_the_next_run_resumes(root, tmp_path):
    options = ("--size=16", f"--vae={root}/vae", "--examples_per_shard=5")
    command = [*COMMAND, root / "data", tmp_path / "cache", *options]
    full_disk.expect_one_line(command)
    subprocess.run(command, check=True)
    assert contents(tmp_path / "cache") == contents(root / "cache")


def count_notes(out):
    return len(list((out / arrayrecord.PROGRESS).glob("latents*.json")))


def test_verify_flag_encodes_again_and_checks_digests(call, refuse, root, tmp_path):
    options = ("--size=16", f"--vae={root}/vae", "--examples_per_shard=5", "--verify=10")
    code, out, errors = call(encode, root / "data", root / "cache", *options)
    assert code == 0 and "the same: 10 examples, off by at most" in out, errors
    manifest = json.loads((root / "cache" / "manifest.json").read_text())
    (tmp_path / "bad").mkdir()
    for name, data in contents(root / "cache").items():
        if name in manifest["shards"]:
            data = bytearray(data)
            data[len(data) // 2] ^= 1
        (tmp_path / "bad" / name).write_bytes(data)
    line = refuse(encode, root / "data", tmp_path / "bad", *options)
    assert "is damaged: its sha256 is not" in line


@pytest.mark.parametrize(
    "args, message",
    [
        (["{data}", "{out}"], "--vae must be given"),
        (["{data}", "--vae={vae}"], "takes DATASET OUT, got"),
        (["/nowhere", "{out}", "--vae={vae}"], "DATASET must exist, got /nowhere"),
        (["{data}", "{out}", "--vae={data}"], "vae must be a folder that `dit-convert vae` wrote"),
        (["{data}", "{out}", "--vae={vae}", "--split=test"], "split must be one of train"),
        (["{data}", "{out}", "--vae={vae}", "--size=15"], "size must be divisible by 4, got 15"),
        (
            ["{data}", "{out}", "--vae={vae}", "--size=1000000000"],
            "--size must be a whole number in 1 ",
        ),
        (
            ["{data}", "{cache}", "--vae={other}", "--size=16", "--examples_per_shard=5"],
            "vae_digests must be ",
        ),
        (["{data}", "{cache}", "--vae={vae}", "--size=32"], "size must be 16, as in"),
        (
            ["{data}", "{cache}", "--vae={vae}", "--size=16", "--dtype=float32"],
            'dtype must be "float16", as in',
        ),
        (["{data}", "{tree}", "--vae={vae}", "--size=16"], "OUT must be new, empty or written by"),
        (
            ["{data}", "{out}", "--vae={vae}", "--size=16", "--verify=3"],
            "OUT must be a finished directory of dit-encode",
        ),
    ],
)
def test_wrong_use_prints_one_line(refuse, root, tmp_path, args, message):
    names = ("data", "vae", "other", "cache", "tree")
    paths = {name: root / name for name in names} | {"out": tmp_path / "out"}
    before = contents(root / "cache")
    assert message in refuse(encode, *(arg.format(**paths) for arg in args))
    assert contents(root / "cache") == before


def test_second_run_in_the_same_directory_is_refused(refuse, root, tmp_path):
    (tmp_path / "out").mkdir()
    options = ("--size=16", f"--vae={root}/vae")
    with disk.locked(tmp_path / "out", "OUT"):
        line = refuse(encode, root / "data", tmp_path / "out", *options)
    assert "OUT must not be written by another run, got" in line


def test_lost_shards_of_a_finished_cache_are_written_again(root, tmp_path):
    out = tmp_path / "cache"
    shutil.copytree(root / "cache", out)
    one, two = sorted(out.glob("*.array_record*"))[1:3]
    one.unlink()
    two.write_bytes(two.read_bytes()[:-10])
    options = ("--size=16", f"--vae={root}/vae", "--examples_per_shard=5")
    subprocess.run([*COMMAND, root / "data", out, *options], check=True)
    assert contents(out) == contents(root / "cache")


def test_split_must_be_the_encoded_one(root):
    config = make_config(root, "latents")
    config.data.split = "validation"
    with pytest.raises(ValueError, match="data.split must be train, .*/cache, got val"):
        feed.make(config)


def test_corrupt_shard_prints_one_line(call, refuse, root, tmp_path):
    for name in ("cache", "data"):
        shutil.copytree(root / name, tmp_path / name)
        for path in (tmp_path / name).glob("*array_record*"):
            data = bytearray(path.read_bytes())
            data[500:564] = bytes(x ^ 1 for x in data[500:564])  # in the first example
            path.write_bytes(data)
    options = (
        *("--config=configs/imagenet256.py:Pi/2", "--config.model.input_size=(4, 4)"),
        *("--config.model.num_classes=3", "--config.train.batch_size=24"),
        "--config.run.total_steps=4",
        f"--config.data.vae={root}/vae",
    )
    for source, name in (("latents", "cache"), ("images", "data")):
        where = (f"--config.data.path={tmp_path}/{name}", f"--workdir={tmp_path}/run_{name}")
        with jax.numpy_dtype_promotion("standard"):
            code, _, errors = call(train, *options, *where, f"--config.data.source={source}")
        assert code == 2, errors
        assert f"of {tmp_path}/{name} cannot be read: its shard is damaged" in errors
        assert "Traceback" not in errors and len(errors.splitlines()[-1]) < 400
    line = refuse(encode, tmp_path / "data", tmp_path / "x", "--size=16", f"--vae={root}/vae")
    assert f"of {tmp_path}/data cannot be read: its shard is damaged, copy it again" in line


def test_vae_must_be_the_one_that_encoded_the_cache(root):
    config = make_config(root, "latents")
    config.data.vae = str(root / "other")
    with pytest.raises(ValueError, match="data.vae must be the one that encoded .*/cache, got"):
        feed.make(config)
    config.data.vae = ""
    assert feed.make(config).decoder is None
