import gc
import json
import re
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dit_jax.checkpoint import digests, steps, store
from dit_jax.machine import sharding

META = {"config": {"seed": 3}}


def make_tree():
    key = jax.random.key(0)
    return {
        "kernel": jax.random.normal(key, (8, 16)),
        "half": jax.random.normal(key, (8,)).astype(jnp.bfloat16),
        "count": jnp.int32(7),
    }


def abstract(tree):
    place = sharding.replicated(sharding.make_mesh())
    return sharding.abstract(tree, jax.tree.map(lambda _: place, tree))


def save(directory, tree, steps=(5,)):
    with store.open_writer() as writer:
        for step in steps:
            store.save(writer, directory, step, {"params": tree, "ema": tree}, META)


def test_what_was_saved_comes_back_bit_for_bit(tmp_path):
    tree = make_tree()
    save(tmp_path, tree)
    items = store.restore(tmp_path, 5, {"ema": abstract(tree)})
    assert items.keys() == {"ema"}
    for name, leaf in tree.items():
        assert items["ema"][name].dtype == leaf.dtype
        np.testing.assert_array_equal(items["ema"][name], leaf)


def test_meta_says_what_and_with_which_versions(tmp_path):
    save(tmp_path, make_tree())
    meta = store.read_meta(tmp_path, 5)
    assert meta["config"] == {"seed": 3} and meta["step"] == 5
    assert meta["versions"]["jax"] == jax.__version__
    assert meta["digests"]["params"].keys() == {"['kernel']", "['half']", "['count']"}


def test_a_changed_meta_is_named(tmp_path):
    save(tmp_path, make_tree())
    path = tmp_path / "5" / "meta" / "metadata"
    path.write_text(path.read_text().replace('"seed": 3', '"seed": 2'))
    with pytest.raises(store.Damaged, match="is damaged: its meta is not what was saved"):
        store.read_meta(tmp_path, 5)


def test_a_deleted_step_is_none_even_while_its_files_are_there(tmp_path, monkeypatch):
    save(tmp_path, make_tree(), steps=(5, 10))
    with monkeypatch.context() as patch:
        patch.setattr(steps.shutil, "rmtree", lambda *_, **options: None)
        steps.delete(tmp_path, 5)
    assert steps.saved(tmp_path) == [10] and len(list(tmp_path.iterdir())) == 2
    steps.clean(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["10"]


def test_a_directory_without_a_whole_step_has_no_latest(tmp_path):
    assert steps.latest(tmp_path / "missing") is None
    (tmp_path / "20").mkdir()
    (tmp_path / "30.orbax-checkpoint-tmp").mkdir()
    assert steps.latest(tmp_path) is None


def test_a_step_is_found_from_the_run_its_steps_or_its_own_folder(tmp_path, monkeypatch):
    directory = tmp_path / "run" / "checkpoints"
    save(directory, make_tree(), steps=(5, 10))
    assert steps.locate(tmp_path / "run") == steps.locate(directory) == (directory, 10)
    assert steps.locate(directory / "5") == (directory, 5)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert steps.locate("~/run") == (directory, 10)


@pytest.mark.parametrize("text", ["{", "", "[]", "{}"])
def test_a_damaged_meta_is_named(tmp_path, text):
    save(tmp_path, make_tree())
    (tmp_path / "5" / "meta" / "metadata").write_text(text)
    with pytest.raises(ValueError, match=f"^checkpoint {tmp_path}/5 [^\n]*$"):
        store.read_meta(tmp_path, 5)


def test_a_truncated_array_is_named(tmp_path):
    tree = {"kernel": jax.random.normal(jax.random.key(1), (64, 64))}
    save(tmp_path, tree)
    path = largest_file(tmp_path / "5" / "ema")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=f"^checkpoint {tmp_path}/5 cannot be read: [^\n]*$"):
        store.restore(tmp_path, 5, {"ema": abstract(tree)})


def test_a_failed_read_leaves_no_other_behind(tmp_path, monkeypatch, caplog):
    tree = {f"layer_{i}": jnp.ones((256, 256)) for i in range(40)}
    save(tmp_path, tree)
    path = largest_file(tmp_path / "5" / "ema")
    path.write_bytes(path.read_bytes()[:100])
    complaints = []
    monkeypatch.setattr(sys, "unraisablehook", complaints.append)
    for _ in range(3):
        with pytest.raises(ValueError, match="cannot be read: .*byte range"):
            store.restore(tmp_path, 5, {"ema": abstract(tree)})
        gc.collect()
    assert not complaints and "asyncio" not in caplog.text


def test_digests_do_not_depend_on_the_sharding():
    tree, mesh = make_tree(), sharding.make_mesh()
    spread = {
        "kernel": jax.device_put(tree["kernel"], NamedSharding(mesh, PartitionSpec(None, "data"))),
        "half": jax.device_put(tree["half"], NamedSharding(mesh, PartitionSpec("data"))),
        "count": tree["count"],
    }
    assert digests.of_tree(spread) == digests.of_tree(tree)


@pytest.mark.parametrize("dtype, word", [(np.float32, np.uint32), (np.int32, np.uint32)])
def test_every_flipped_bit_changes_both_halves_of_the_digest(dtype, word):
    values = np.random.default_rng(0).integers(0, 2**31, 5).astype(dtype)
    before = digests.of_tree({"x": values})["['x']"]
    for place in range(5):
        for bit in range(32):
            flipped = values.view(word).copy()
            flipped[place] ^= word(1) << word(bit)
            after = digests.of_tree({"x": flipped.view(dtype)})["['x']"]
            assert before[:8] != after[:8] and before[8:] != after[8:], (place, bit)


@pytest.mark.parametrize("shape", [(), (3,), (digests.BLOCK + 5,), (2, 300, 500)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8"])
def test_the_host_and_the_devices_have_the_same_digest(shape, dtype):
    x = jax.random.uniform(jax.random.key(0), shape, maxval=200).astype(dtype)
    assert digests.of_tree({"x": x})["['x']"] == digests.of_array(np.asarray(x))


def test_swapped_values_change_the_digest():
    a, b = np.float32([1, 2, 3, 4]), np.float32([1, 3, 2, 4])
    assert digests.of_tree({"x": a}) != digests.of_tree({"x": b})


class State(NamedTuple):
    mean: dict
    count: jax.Array


def test_verify_reads_all_kinds_of_trees_leaf_by_leaf(tmp_path):
    tree = {"layer_1": make_tree()}
    items = {"params": tree, "opt_state": (State(tree, jnp.int32(3)), (), [jnp.ones(2)])}
    with store.open_writer(background=False) as writer:
        store.save(writer, tmp_path, 5, items, META)
    store.verify(tmp_path, 5)
    path = tmp_path / "5" / "meta" / "metadata"
    text = path.read_text()
    for name, leaf in [("params", "['layer_1']['half']"), ("opt_state", "[0].count")]:
        meta = json.loads(text)
        saved = meta["digests"][name][leaf]
        meta["digests"][name][leaf] = "0" * 16
        meta.pop("sha256")
        path.write_text(json.dumps(meta))
        with pytest.raises(store.Damaged, match=re.escape(f"{name}{leaf} has digest {saved}")):
            store.verify(tmp_path, 5)
        found = []
        for part in range(3):
            try:
                store.verify(tmp_path, 5, share=(part, 3))
            except store.Damaged:
                found.append(part)
        assert len(found) == 1  # every leaf is in one share


def test_digests_are_not_compared_where_that_is_not_wanted(tmp_path):
    tree = {"kernel": jax.random.normal(jax.random.key(1), (64, 64))}
    save(tmp_path, tree)
    flip(largest_file(tmp_path / "5" / "ema"))
    with pytest.raises(store.Damaged, match="ema.'kernel'. has digest"):
        store.restore(tmp_path, 5, {"ema": abstract(tree)})
    store.restore(tmp_path, 5, {"ema": abstract(tree)}, verify=False)
    with pytest.raises(store.Damaged, match="ema.'kernel'. has digest"):
        store.verify(tmp_path, 5)


def largest_file(folder):
    return max(folder.rglob("*"), key=lambda path: path.is_file() and path.stat().st_size)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)


def test_a_flipped_bit_on_the_disk_never_passes(tmp_path):
    tree = {"kernel": jax.random.normal(jax.random.key(1), (64, 64))}
    save(tmp_path, tree)
    template = {"ema": abstract(tree)}
    path = largest_file(tmp_path / "5" / "ema")
    whole, named = path.read_bytes(), 0
    for offset in np.linspace(100, len(whole) - 100, 12).astype(int):
        damaged = bytearray(whole)
        damaged[offset] ^= 16
        path.write_bytes(damaged)
        try:
            items = store.restore(tmp_path, 5, template)
        except ValueError as error:  # ours, or Orbax's own of a broken file
            named += r"is damaged: ema['kernel'] has digest" in str(error)
        else:  # a bit that no value depends on
            np.testing.assert_array_equal(items["ema"]["kernel"], tree["kernel"])
    assert named >= 6
    path.write_bytes(whole)
    store.restore(tmp_path, 5, template)


def test_a_state_that_is_donated_after_the_save_is_saved_as_it_was(tmp_path):
    tree = {"x": jnp.arange(1_000_000, dtype=jnp.float32)}
    saved = np.asarray(tree["x"]).copy()
    advance = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    with store.open_writer() as writer:
        store.save(writer, tmp_path, 1, {"params": tree}, META)
        for _ in range(20):
            tree = advance(tree)
    restored = store.restore(tmp_path, 1, {"params": abstract(tree)})
    np.testing.assert_array_equal(restored["params"]["x"], saved)
