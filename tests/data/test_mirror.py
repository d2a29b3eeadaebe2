import concurrent.futures
import json
import logging
import os
import resource
import signal
import subprocess
import sys
import time

import latent_cache
import numpy as np
import pictures
import pytest

from dit_jax.data import imagefolder, latents, mirror, prepare, prepared
from dit_jax.errors import UserError
from dit_jax.machine import disk


@pytest.fixture
def whole(tmp_path):
    """A cache of latents in five shards on the disk."""
    return latent_cache.write(tmp_path / "whole")


@pytest.fixture
def remote(whole, bucket_path):
    """The same in a bucket."""
    return latent_cache.upload(whole, bucket_path)


@pytest.fixture
def copy(remote, tmp_path):
    """copy() -> the folder of the copy."""
    return lambda: mirror.local(remote, "train", tmp_path / "cache")


@pytest.fixture
def reads(storage, remote):
    """The names of the shards that are read from now on."""
    names = []

    def may_read(name):
        if "array_record" in name:
            names.append(name.rpartition("/")[2])
        return True

    storage.allow(read=may_read)
    return names


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def shard_names(folder):
    return sorted(path.name for path in folder.glob("*array_record*"))


def edit(storage, path, change):
    """Replaces the content of an object by change(content)."""
    key = ("tests", str(path).removeprefix("gs://tests/"))
    storage.objects[key] = storage.objects[key]._replace(content=change(storage.objects[key][0]))


def flip(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :]


def test_a_path_on_a_disk_is_itself(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert mirror.local("~/data", "train") == tmp_path / "data"
    assert list(tmp_path.iterdir()) == []


def test_a_copy_is_whole_and_made_once(copy, reads, whole, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    folder = copy()
    assert folder.parent == tmp_path / "cache"
    assert contents(folder) == contents(whole)
    total = sum(len(content) for name, content in contents(whole).items() if "array" in name)
    assert f"5 shards, {total / 1e9:.3g} GB, of which 0 GB are there" in caplog.text
    assert f"copied {total / 1e9:.3g} GB in 0 s, " in caplog.text
    reads.clear()
    assert copy() == folder and not reads
    source, expected = latents.open_latents(folder), latents.open_latents(whole)
    assert source.sha256 == expected.sha256 and source.sha256[:12] in folder.name
    np.testing.assert_array_equal(source[7]["moments"], expected[7]["moments"])


def test_the_default_folder_is_in_the_cache_of_the_user(remote, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert mirror.local(remote, "train").parent == tmp_path / ".cache" / "dit_jax"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert mirror.local(remote, "train").parent == tmp_path / "xdg" / "dit_jax"


def test_another_content_at_the_same_path_is_another_copy(copy, remote, tmp_path):
    first = copy()
    latent_cache.upload(latent_cache.write(tmp_path / "new", seed=1), remote)
    assert copy() != first and contents(copy()) == contents(tmp_path / "new")


def test_only_the_split_of_a_prepared_data_set_is_copied(bucket_path, storage, tmp_path):
    pictures.draw(tmp_path / "tree", per_class=3)
    listing = imagefolder.scan(tmp_path / "tree")
    for split, num_shards in (("train", 2), ("validation", 1)):
        prepare.write(tmp_path / "data", split, listing, num_shards=num_shards)
    remote = latent_cache.upload(tmp_path / "data", bucket_path)
    folder = mirror.local(remote, "train", tmp_path / "cache")
    assert len(shard_names(folder)) == 2 and "train" in shard_names(folder)[0]
    source = prepared.open_images(folder, "train", 16)
    expected = prepared.open_images(tmp_path / "data", "train", 16)
    assert len(source) == 9 and source.sha256 == expected.sha256
    assert source.short_sides == expected.short_sides
    for i in range(9):
        np.testing.assert_array_equal(source[i]["image"], expected[i]["image"])
    assert prepared.open_images(tmp_path / "data", "validation", 16).sha256 != source.sha256
    with pytest.raises(UserError, match="data.split must be one of train, validation in gs:.*tes"):
        mirror.local(remote, "test", tmp_path / "cache")


COPY = (
    "import sys; from dit_jax.data import mirror; mirror.local(sys.argv[1], 'train', sys.argv[2])"
)


def test_a_killed_copy_goes_on_and_is_never_taken_for_a_whole_one(
    copy, remote, storage, whole, tmp_path
):
    process = subprocess.Popen([sys.executable, "-c", COPY, str(remote), str(tmp_path / "cache")])
    started = []

    def may_read(name):
        started.append(name)
        if "00003" in name and sum("00003" in each for each in started) == 2:  # 1: asks its size
            process.kill()
            return False
        return True

    storage.allow(read=may_read)
    assert process.wait(timeout=100) == -signal.SIGKILL
    (folder,) = (tmp_path / "cache").iterdir()
    assert not (folder / "manifest.json").exists()
    finished = shard_names(folder)
    storage.allow(read=lambda name: not any(each in name for each in finished))
    assert contents(copy()) == contents(whole)


def test_the_rest_of_a_partial_shard_is_read_only(copy, remote, whole, monkeypatch):
    ranges, read = [], disk.read_range
    monkeypatch.setattr(disk, "read_range", lambda *args: ranges.append(args[1:]) or read(*args))
    monkeypatch.setattr(mirror, "BLOCK", 50_000)
    folder = copy()
    name = shard_names(whole)[2]
    data = (whole / name).read_bytes()
    assert (50_000, 100_000) in ranges and max(end for _, end in ranges) == len(data)
    (folder / "manifest.json").unlink()
    (folder / name).unlink()
    ranges.clear()
    (folder / f".partial-{name}").write_bytes(data[:1500])
    assert contents(copy()) == contents(whole)
    assert ranges[0] == (1500, 51_500)


@pytest.mark.parametrize("left", [lambda data: flip(data[:900]), lambda data: data + b"more"])
def test_other_bytes_in_a_partial_shard_are_replaced(copy, whole, left):
    folder, name = copy(), shard_names(whole)[2]
    (folder / name).unlink()
    (folder / f".partial-{name}").write_bytes(left((whole / name).read_bytes()))
    assert contents(copy()) == contents(whole)


def test_a_transfer_that_is_cut_is_tried_again(copy, remote, storage, whole):
    storage.cuts = {f"{remote.name}/{name}" for name in shard_names(whole)[:2]}
    assert contents(copy()) == contents(whole) and not storage.cuts


@pytest.mark.parametrize(
    "change, message",
    [
        (flip, "{shard} is damaged: its sha256 is not .*: copy it to the bucket again"),
        (lambda data: data[:-7], "{shard} must have .* bytes, got .*or copy it again"),
    ],
)
def test_damage_in_the_bucket_is_one_line_and_other_shards_are_kept(
    copy, remote, storage, whole, reads, change, message
):
    name = shard_names(whole)[4]
    edit(storage, remote / name, change)
    with pytest.raises(UserError, match=message.format(shard=remote / name)):
        copy()
    (remote / name).write_bytes((whole / name).read_bytes())
    reads.clear()
    assert contents(copy()) == contents(whole)
    assert name in reads


def test_a_flipped_bit_in_the_copy_is_repaired_by_the_next_call(copy, whole, reads):
    folder, name = copy(), shard_names(whole)[0]
    source = latents.open_latents(folder)
    expected = source[0]["moments"].copy()
    data = bytearray((folder / name).read_bytes())
    at = data.index(source.records[0][:40])
    data[at + 9] ^= 1
    (folder / name).write_bytes(data)
    watched = mirror.Watched(latents.open_latents(folder), folder)
    assert len(watched) == 40 and watched[20]["label"] == 0
    with pytest.raises(UserError, match="its shard is damaged, .*; this is a copy, which the same"):
        watched[0]
    reads.clear()
    assert copy() == folder
    assert name in reads and shard_names(whole)[1] not in reads
    np.testing.assert_array_equal(latents.open_latents(folder)[0]["moments"], expected)


@pytest.mark.parametrize("damage", ["{", "{}"])
def test_a_damaged_manifest_of_a_copy_is_written_again(copy, whole, damage):
    (copy() / "manifest.json").write_text(damage)
    assert contents(copy()) == contents(whole)


def test_a_disk_without_room_is_refused_before_a_shard_is_read(copy, reads, monkeypatch):
    monkeypatch.setattr(mirror.shutil, "disk_usage", lambda path: type("", (), {"free": 1000}))
    with pytest.raises(
        UserError, match="data.cache must have .* GB free for the rest of gs://test"
    ):
        copy()
    assert not reads


def test_a_disk_that_fills_up_is_one_line_and_the_copy_goes_on(copy, whole):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))  # the system refuses in the same way
    try:
        with pytest.raises(OSError, match="could not be copied to .*File too large; what was cop"):
            copy()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert contents(copy()) == contents(whole)


def test_a_bucket_that_refuses_is_one_line(copy, storage, tmp_path):
    storage.allow(read=lambda name: "array_record" not in name)
    with pytest.raises(
        UserError, match="data.path must be readable, got gs://.*: Forbidden: [^\n]*$"
    ):
        copy()
    storage.allow(read=lambda name: False)
    with pytest.raises(
        UserError, match="data.path must be readable, got gs://.*: Forbidden: [^\n]*$"
    ):
        copy()


def test_processes_of_a_host_share_one_copy(copy, whole, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(mirror, "LOG_SECONDS", 0)
    read, names = disk.read_range, []

    def slowly(path, *args):
        names.append(path.name)
        time.sleep(0.3)
        return read(path, *args)

    monkeypatch.setattr(disk, "read_range", slowly)
    with concurrent.futures.ThreadPoolExecutor(3) as pool:  # a lock is of an open file
        folders = [each.result() for each in [pool.submit(copy) for _ in range(3)]]
    assert len(set(folders)) == 1 and contents(folders[0]) == contents(whole)
    assert sorted(names) == shard_names(whole)
    assert "another process copies gs://" in caplog.text and " s left" in caplog.text


@pytest.mark.parametrize(
    "manifest",
    [
        None,
        {},
        {"splits": [1]},
        {"splits": {"train": 1}},
        {"vae": {}, "shards": {"x": 1}},
        {"splits": {"train": {"shards": {"../x": {"sha256": "0", "file_bytes": 1}}}}},
    ],
)
def test_anything_else_in_a_bucket_is_refused(storage, bucket_path, tmp_path, manifest):
    (bucket_path / "x").write_text("x")
    if manifest is not None:
        (bucket_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="data.path must be an output of dit-prepare or dit-encode"):
        mirror.local(bucket_path, "train", tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_the_folder_of_copies_must_be_on_a_disk_and_writable(remote, tmp_path):
    with pytest.raises(UserError, match="data.cache must be on a disk, got gs://tests/cache"):
        mirror.local(remote, "train", "gs://tests/cache")
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="could not be copied to .*/file/.*Not a directory"):
        mirror.local(remote, "train", tmp_path / "file")
    assert os.listdir(tmp_path) == ["file"] or (tmp_path / "file").read_bytes() == b""
