"""dit-encode from end to end: the cache against the loop, kills, processes, and what it refuses."""

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
from dit_jax.data import feed, imagefolder, latents, loader, prepared, shards
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
def places(tmp_path_factory):
    """A prepared dataset of 24 images, `data`, two autoencoders, `vae` and `other`, and a cache."""
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


def test_dit_verify_reads_a_cache(call, places, tmp_path):
    cache = shutil.copytree(places / "cache", tmp_path / "cache")
    assert call(verify, cache)[0] == 0
    shard = max(cache.glob("*array_record*"))
    shard.write_bytes(bytes(100))
    code, said, _ = call(verify, cache)
    assert code == 1 and f"DAMAGED: {shard} must have" in said


@pytest.mark.parametrize("dtype, bound", [("float16", 5e-4), ("float32", 0)])
def test_the_cache_is_what_encoding_in_the_loop_gives(call, places, tmp_path, dtype, bound):
    options = (f"--vae={places}/vae", "--size=16", f"--dtype={dtype}")
    assert call(encode, places / "data", tmp_path / "cache", *options)[0] == 0
    cache = latents.open_latents(tmp_path / "cache")
    source = prepared.open_images(places / "data", "train", 16)
    model = autoencoder.load(places / "vae")
    assert len(cache) == len(source) == 24 and cache.num_classes == 3
    for i in range(24):
        example, kept = source[i], cache[i]
        image = example["image"]
        expected = model.encode(np.stack([image, image[:, ::-1]]))
        assert kept["label"] == example["label"] and kept["moments"].dtype == np.float32
        # The programs differ in their batches: float32 sums in another order.
        slack = bound * np.abs(expected) + 2e-5 * np.abs(expected).max()
        assert (np.abs(kept["moments"] - expected) <= slack).all()


def take(config, count):
    """The first batches that a config's training is fed with."""
    fed = feed.make(config)
    place = sharding.of_batch(sharding.make_mesh())
    batches = loader.batches(
        fed.source, batch_size=8, seed=5, start=0, sharding=place, augment=fed.augment
    )
    return [jax.device_get(fed.prepare(batch)) for batch in itertools.islice(batches, count)]


def make_config(places, source):
    from configs import imagenet256

    config = imagenet256.get_config("Ti/2")
    config.model.input_size, config.model.num_classes = (4, 4), 3
    config.data.source = source
    config.data.path = str(places / ("cache" if source == "latents" else "data"))
    config.data.vae = str(places / "vae")
    return config


def test_training_from_the_cache_sees_what_training_from_the_images_sees(places):
    """The same examples, labels and flips, over three epochs, and moments to float16's rounding."""
    from_images = take(make_config(places, "images"), 9)
    from_cache = take(make_config(places, "latents"), 9)
    for one, two in zip(from_images, from_cache, strict=True):
        np.testing.assert_array_equal(one["label"], two["label"])
        bound = 2e-3 * np.abs(one["moments"]).max()
        np.testing.assert_allclose(one["moments"], two["moments"], atol=bound)
    flat = [batch["moments"].reshape(8, -1) for batch in from_cache]
    assert len(np.unique(np.concatenate(flat), axis=0)) > 24  # flips: more than the images


def test_a_run_from_the_cache(call, places, tmp_path):
    options = (
        *("--config=configs/imagenet256.py:Ti/2", "--config.model.input_size=(4, 4)"),
        *("--config.model.num_classes=3", "--config.train.batch_size=8"),
        *("--config.data.source=latents", f"--config.data.path={places}/cache"),
        *(f"--config.data.vae={places}/vae", "--config.run.total_steps=2"),
        *("--config.sampling.num_steps=3", "--config.run.num_samples=3"),
    )
    with jax.numpy_dtype_promotion("standard"):  # optax's Adam mixes types
        code, _, errors = call(train, *options, f"--workdir={tmp_path}/run")
    assert code == 0, errors
    assert (tmp_path / "run" / "samples" / "0000002.png").is_file()


@pytest.mark.parametrize("count", [2, 4])
def test_any_number_of_processes_writes_the_same_bytes(places, tmp_path, count, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=1")
    address = processes.free_address()
    options = (places / "data", tmp_path / "cache", "--size=16", f"--vae={places}/vae")
    options += ("--examples_per_shard=5",)
    workers = [
        subprocess.Popen([*COMMAND, *options, *processes.flags(address, count, i)])
        for i in range(count)
    ]
    assert [worker.wait(timeout=240) for worker in workers] == [0] * count
    assert contents(tmp_path / "cache") == contents(places / "cache")


def test_kill_9_at_random_moments_changes_no_byte(places, tmp_path):
    pictures.draw(tmp_path / "tree", per_class=40)
    shards.write(tmp_path / "data", "train", imagefolder.scan(tmp_path / "tree"))
    options = ("--size=16", f"--vae={places}/vae", "--examples_per_shard=1")
    command = [*COMMAND, tmp_path / "data", tmp_path / "killed", *options]
    chance = random.Random(0)
    for _ in range(5):
        process = subprocess.Popen(command)
        done = count_notes(tmp_path / "killed") + chance.randint(1, 3)
        while process.poll() is None and count_notes(tmp_path / "killed") < done:
            time.sleep(0.0005)
        time.sleep(chance.uniform(0, 0.005))
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert 5 <= count_notes(tmp_path / "killed") < 120
    subprocess.run(command, check=True)
    subprocess.run([*COMMAND, tmp_path / "data", tmp_path / "whole", *options], check=True)
    assert len(latents.read_manifest(tmp_path / "whole")["shards"]) == 120
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_a_disk_that_is_full_is_a_line_and_the_next_run_goes_on(places, tmp_path):
    options = ("--size=16", f"--vae={places}/vae", "--examples_per_shard=5")
    command = [*COMMAND, places / "data", tmp_path / "cache", *options]
    full_disk.expect_one_line(command)
    subprocess.run(command, check=True)
    assert contents(tmp_path / "cache") == contents(places / "cache")


def count_notes(out):
    return len(list((out / shards.PROGRESS).glob("latents*.json")))


def test_verify_encodes_again(call, refuse, places, tmp_path):
    options = ("--size=16", f"--vae={places}/vae", "--examples_per_shard=5", "--verify=10")
    code, out, errors = call(encode, places / "data", places / "cache", *options)
    assert code == 0 and "the same: 10 examples within" in out, errors
    manifest = json.loads((places / "cache" / "manifest.json").read_text())
    (tmp_path / "bad").mkdir()
    for name, data in contents(places / "cache").items():
        if name in manifest["shards"]:
            data = bytearray(data)
            data[len(data) // 2] ^= 1
        (tmp_path / "bad" / name).write_bytes(data)
    line = refuse(encode, places / "data", tmp_path / "bad", *options)
    assert "is damaged: its sha256 is not" in line


@pytest.mark.parametrize(
    "args, message",
    [
        (["{data}", "{out}"], "--vae must be given"),
        (["{data}", "--vae={vae}"], "takes DATASET OUT, got"),
        (["/nowhere", "{out}", "--vae={vae}"], "dataset must be a directory of dit-prepare"),
        (["{data}", "{out}", "--vae={data}"], "vae must be a folder that `dit-convert vae` wrote"),
        (["{data}", "{out}", "--vae={vae}", "--split=test"], "split must be one of train"),
        (["{data}", "{out}", "--vae={vae}", "--size=15"], "size must be divisible by 4, got 15"),
        (["{data}", "{cache}", "--vae={other}", "--size=16"], "vae_digests must be that of"),
        (["{data}", "{cache}", "--vae={vae}", "--size=32"], "size must be that of"),
        (
            ["{data}", "{cache}", "--vae={vae}", "--size=16", "--dtype=float32"],
            "dtype must be that",
        ),
        (["{data}", "{tree}", "--vae={vae}", "--size=16"], "OUT must be new, empty or of dit-enc"),
        (
            ["{data}", "{out}", "--vae={vae}", "--size=16", "--verify=3"],
            "OUT must be a finished directory of dit-encode",
        ),
    ],
)
def test_wrong_use_is_one_line(refuse, places, tmp_path, args, message):
    names = ("data", "vae", "other", "cache", "tree")
    paths = {name: places / name for name in names} | {"out": tmp_path / "out"}
    before = contents(places / "cache")
    assert message in refuse(encode, *(arg.format(**paths) for arg in args))
    assert contents(places / "cache") == before


def test_two_runs_do_not_write_one_directory(refuse, places, tmp_path):
    (tmp_path / "out").mkdir()
    options = ("--size=16", f"--vae={places}/vae")
    with disk.locked(tmp_path / "out", "OUT"):
        line = refuse(encode, places / "data", tmp_path / "out", *options)
    assert "OUT must not be written by another run, got" in line


def test_what_a_finished_cache_has_lost_is_written_again(places, tmp_path):
    out = tmp_path / "cache"
    shutil.copytree(places / "cache", out)
    one, two = sorted(out.glob("*.array_record*"))[1:3]
    one.unlink()
    two.write_bytes(two.read_bytes()[:-10])
    options = ("--size=16", f"--vae={places}/vae", "--examples_per_shard=5")
    subprocess.run([*COMMAND, places / "data", out, *options], check=True)
    assert contents(out) == contents(places / "cache")


def test_the_split_of_a_run_is_that_of_its_cache(places):
    config = make_config(places, "latents")
    config.data.split = "validation"
    with pytest.raises(ValueError, match="data.split must be train, that of .*/cache, got val"):
        feed.make(config)


def test_a_damaged_shard_is_a_line(call, refuse, places, tmp_path):
    for name in ("cache", "data"):
        shutil.copytree(places / name, tmp_path / name)
        for path in (tmp_path / name).glob("*array_record*"):
            data = bytearray(path.read_bytes())
            data[500:564] = bytes(x ^ 1 for x in data[500:564])  # of the first example
            path.write_bytes(data)
    options = (
        *("--config=configs/imagenet256.py:Ti/2", "--config.model.input_size=(4, 4)"),
        *("--config.model.num_classes=3", "--config.train.batch_size=24"),
        "--config.run.total_steps=4",
        f"--config.data.vae={places}/vae",
    )
    for source, name in (("latents", "cache"), ("images", "data")):
        where = (f"--config.data.path={tmp_path}/{name}", f"--workdir={tmp_path}/run_{name}")
        with jax.numpy_dtype_promotion("standard"):
            code, _, errors = call(train, *options, *where, f"--config.data.source={source}")
        assert code == 2, errors
        assert f"of {tmp_path}/{name} cannot be read: its shard is damaged" in errors
        assert "Traceback" not in errors and len(errors.splitlines()[-1]) < 400
    line = refuse(encode, tmp_path / "data", tmp_path / "x", "--size=16", f"--vae={places}/vae")
    assert f"of {tmp_path}/data cannot be read: its shard is damaged, copy it again" in line


def test_another_autoencoder_does_not_show_the_cache(places):
    config = make_config(places, "latents")
    config.data.vae = str(places / "other")
    with pytest.raises(ValueError, match="data.vae must be the one that encoded .*/cache, got"):
        feed.make(config)
    config.data.vae = ""
    assert feed.make(config).decoder is None


def test_a_cache_cut_short_is_named(places, tmp_path):
    (tmp_path / "cut").mkdir()
    for name, data in contents(places / "cache").items():
        (tmp_path / "cut" / name).write_bytes(data[:-10] if "array_record" in name else data)
    with pytest.raises(
        ValueError, match="must have .* bytes, got .*: start the command that wrote it"
    ):
        latents.open_latents(tmp_path / "cut")
