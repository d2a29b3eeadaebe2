import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from trees import make_tree

from dit_jax.checkpoint import digests
from dit_jax.machine import sharding


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
def test_the_host_and_the_devices_have_the_same_digest(shape, dtype, monkeypatch):
    x = jax.random.uniform(jax.random.key(0), shape, maxval=200).astype(dtype)
    on_host = digests.of_tree({"x": x})
    monkeypatch.setattr(digests, "SMALL", -1)
    monkeypatch.setattr(digests, "of_array", None)  # which the devices do not need
    assert digests.of_tree({"x": x}) == on_host


def test_a_large_array_is_summed_up_on_its_device(monkeypatch):
    x = np.arange(digests.SMALL + 1, dtype=np.int32)
    expected = digests.of_array(x)
    monkeypatch.setattr(digests, "of_array", None)
    assert digests.of_tree({"x": x}) == {"['x']": expected}


def test_swapped_values_change_the_digest():
    a, b = np.float32([1, 2, 3, 4]), np.float32([1, 3, 2, 4])
    assert digests.of_tree({"x": a}) != digests.of_tree({"x": b})
