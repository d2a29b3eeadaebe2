import functools
import gc
import json
import re
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_run
from trees import abstract, make_tree, save

from dit_jax.checkpoint import store
from dit_jax.errors import UserError
from dit_jax.machine import sharding
from dit_jax.models import dit

META = {"config": {"seed": 3}}


def test_a_round_trip_is_bit_exact(tmp_path):
    tree = make_tree()
    save(tmp_path, tree)
    items = store.restore(tmp_path, 5, {"ema": abstract(tree)})
    assert items.keys() == {"ema"}
    for name, leaf in tree.items():
        assert items["ema"][name].dtype == leaf.dtype
        np.testing.assert_array_equal(items["ema"][name], leaf)


def test_meta_has_the_step_the_versions_and_the_digests(tmp_path):
    save(tmp_path, make_tree())
    meta = store.read_meta(tmp_path, 5)
    assert meta["config"] == {"seed": 3} and meta["step"] == 5
    assert meta["versions"]["jax"] == jax.__version__
    assert meta["digests"]["params"].keys() == {"['kernel']", "['half']", "['count']"}


def test_a_changed_meta_is_reported(tmp_path):
    save(tmp_path, make_tree())
    path = tmp_path / "5" / "meta" / "metadata"
    path.write_text(path.read_text().replace('"seed": 3', '"seed": 2'))
    with pytest.raises(store.Damaged, match="is damaged: its meta differs from what was saved"):
        store.read_meta(tmp_path, 5)


@pytest.mark.parametrize("text", ["{", "", "[]", "{}"])
def test_a_corrupt_meta_is_reported(tmp_path, text):
    save(tmp_path, make_tree())
    (tmp_path / "5" / "meta" / "metadata").write_text(text)
    with pytest.raises(ValueError, match=f"^checkpoint {tmp_path}/5 [^\n]*$"):
        store.read_meta(tmp_path, 5)


def test_a_truncated_array_is_reported(tmp_path):
    tree = {"kernel": jax.random.normal(jax.random.key(1), (64, 64))}
    save(tmp_path, tree)
    path = largest_file(tmp_path / "5" / "ema")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=f"^checkpoint {tmp_path}/5 cannot be read: [^\n]*$"):
        store.restore(tmp_path, 5, {"ema": abstract(tree)})


def test_a_failed_read_leaves_no_unfinished_read(tmp_path, monkeypatch, caplog):
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


def test_digests_are_not_compared_without_verify(tmp_path):
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


def test_a_state_may_be_donated_after_the_save(tmp_path):
    tree = {"x": jnp.arange(1_000_000, dtype=jnp.float32)}
    saved = np.asarray(tree["x"]).copy()
    advance = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    with store.open_writer() as writer:
        store.save(writer, tmp_path, 1, {"params": tree}, META)
        for _ in range(20):
            tree = advance(tree)
    restored = store.restore(tmp_path, 1, {"params": abstract(tree)})
    np.testing.assert_array_equal(restored["params"]["x"], saved)


def test_restore_params_reads_one_item_sharded_over_a_mesh(tmp_path):
    config = dit.configure("Ti", 4, input_size=(8, 8), in_channels=1, num_classes=10)
    params = random_run.weights(dit.init, config)
    ema = jax.tree.map(lambda x: 2 * x, params)
    with store.open_writer(background=False) as writer:
        store.save(writer, tmp_path, 5, {"params": params, "ema": ema}, {})
    mesh = sharding.make_mesh(fsdp=4)

    def restore(weights):
        init = functools.partial(dit.init, config, jax.random.key(1))
        return store.restore_params(tmp_path, 5, init, weights=weights, mesh=mesh)

    jax.tree.map(np.testing.assert_array_equal, restore("ema"), ema)
    kernel = restore("params")["blocks"]["mlp"]["fc1"]["kernel"]
    assert kernel.sharding.num_devices == 8 and not kernel.is_fully_replicated
    with pytest.raises(UserError, match="^weights must be of params, ema in .*, got opt_state$"):
        restore("opt_state")
