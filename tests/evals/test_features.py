import json

import numpy as np
import pytest

from dit_jax.errors import UserError
from dit_jax.evals import features

IDENTITY = {"samples": {"seed": 0}, "network": {"network": "of a test"}}
COUNT = 2 * features.SHARD + 100


def images(start, stop):
    numbers = np.arange(start, stop)
    return np.broadcast_to(numbers[:, None, None, None], (len(numbers), 2, 2, 3)), numbers % 10


class Network:
    """Features that say which image they are of; it counts its images, or fails."""

    def __init__(self, fail_at=None):
        self.seen, self.fail_at = [], fail_at

    def __call__(self, x):
        numbers = x[:, 0, 0, 0]
        if self.fail_at in numbers:
            raise KeyboardInterrupt
        self.seen += numbers.tolist()
        return {"pool": numbers[:, None] + np.array([0.0, 0.5]), "logits": numbers[:, None]}


def fill(folder, count=COUNT, identity=IDENTITY, **options):
    network = Network(**options)
    store, _ = features.fill(folder, identity, count, images, network)
    return store, network.seen


def test_features_are_kept_by_index(tmp_path):
    store, seen = fill(tmp_path)
    found = store.read(COUNT)
    assert seen == list(range(COUNT))
    np.testing.assert_array_equal(found["index"], np.arange(COUNT))
    np.testing.assert_array_equal(found["label"], np.arange(COUNT) % 10)
    np.testing.assert_array_equal(found["pool"], np.arange(COUNT)[:, None] + [0, 0.5])
    assert found["pool"].dtype == np.float32
    assert [len(shard["pool"]) for shard in store.shards(COUNT)] == [512, 512, 100]


def test_what_is_there_is_not_computed_again(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        fill(tmp_path, fail_at=700)
    store, seen = fill(tmp_path)
    assert seen == list(range(features.SHARD, COUNT))
    whole, _ = fill(tmp_path / "whole")
    assert store.digests(COUNT) == whole.digests(COUNT)
    assert fill(tmp_path)[1] == []


def test_more_images_can_be_added_and_fewer_be_read(tmp_path):
    fill(tmp_path, count=600)
    store, seen = fill(tmp_path)
    assert seen == list(range(features.SHARD, COUNT))  # the second shard had 88 images
    few, seen = fill(tmp_path, count=40)
    assert seen == [] and len(few.read(40)["pool"]) == 40
    assert few.digests(40) != store.digests(COUNT)


def test_a_damaged_shard_is_made_anew(tmp_path, caplog):
    store, _ = fill(tmp_path)
    before = store.digests(COUNT)
    file = tmp_path / "0000512.npz"
    file.write_bytes(file.read_bytes()[:1000])
    store, seen = fill(tmp_path)
    assert seen == list(range(512, 1024)) and store.digests(COUNT) == before
    assert "0000512.npz is damaged and was moved to 0000512.damaged-" in caplog.text


def test_features_of_others_are_refused(tmp_path):
    fill(tmp_path / "a")
    other = {"samples": {"seed": 1}, "network": {"network": "of a test"}}
    with pytest.raises(UserError, match=r"got .*/a, whose features differ in samples\.seed$"):
        fill(tmp_path / "a", identity=other)
    fill(tmp_path / "b", identity=other)
    (tmp_path / "b/0000512.npz").replace(tmp_path / "a/0000512.npz")
    with pytest.raises(UserError, match=r"shard .*/a/0000512\.npz must be of the same images"):
        fill(tmp_path / "a")


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    fill(tmp_path, count=512)
    replace = features.disk.write_bytes

    def fail(file, data):
        raise OSError("No space left on device")

    monkeypatch.setattr(features.disk, "write_bytes", fail)
    with pytest.raises(OSError, match="No space left"):
        fill(tmp_path)
    monkeypatch.setattr(features.disk, "write_bytes", replace)
    assert fill(tmp_path)[1] == list(range(512, COUNT))


def test_several_shards_are_drawn_at_once(tmp_path):
    """Those that follow each other, of which one is there already."""
    fill(tmp_path)
    for name in ("0000000", "0000512"):
        (tmp_path / f"{name}.npz").unlink()
    calls, network = [], Network()

    def draw(start, stop):
        calls.append((start, stop))
        return images(start, stop)

    store, _ = features.fill(tmp_path, IDENTITY, COUNT + 500, draw, network, at_once=1024)
    assert calls == [(0, 1024), (1024, 1624)]
    np.testing.assert_array_equal(store.read(COUNT + 500)["pool"][:, 0], np.arange(COUNT + 500))


def test_the_identity_can_be_read(tmp_path):
    fill(tmp_path, count=3)
    assert json.loads((tmp_path / "identity.json").read_text()) == IDENTITY
