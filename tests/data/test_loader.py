import itertools

import jax
import numpy as np
import pytest

from dit_jax.data import loader
from dit_jax.errors import UserError
from dit_jax.machine import devices, sharding


class Numbers:
    """Example i holds the number i."""

    def __len__(self):
        return 20

    def __getitem__(self, index):
        return {"image": np.full((1,), index, np.int32)}


def take(count, *, start=0, seed=0, batch_size=8):
    on_all = sharding.of_batch(sharding.make_mesh())
    batches = loader.batches(
        Numbers(), batch_size=batch_size, seed=seed, start=start, sharding=on_all
    )
    return [batch["image"] for batch in itertools.islice(batches, count)]


def numbers(batches):
    return np.concatenate([np.asarray(batch)[:, 0] for batch in batches]).tolist()


def test_batch_is_sharded_over_all_devices():
    (batch,) = take(1)
    assert isinstance(batch, jax.Array) and batch.shape == (8, 1)
    assert len(batch.sharding.device_set) == 8


def test_every_epoch_visits_every_example_once_in_a_new_order():
    seen = numbers(take(5))  # two epochs of 20; the third batch spans both
    first, second = seen[:20], seen[20:]
    assert sorted(first) == sorted(second) == list(range(20))
    assert first != second and first != sorted(first)


def test_resumed_loader_gives_the_same_batches():
    everything = take(9)
    for start in (1, 2, 3, 7):  # within an epoch, at its end, in the next one
        for a, b in zip(take(9 - start, start=start), everything[start:], strict=True):
            np.testing.assert_array_equal(a, b)


def test_order_depends_on_the_seed_only():
    assert numbers(take(2)) == numbers(take(2))
    assert numbers(take(2)) != numbers(take(2, seed=1))


def jitter(example, rng):
    return example | {"random": np.float32(rng.random())}


@pytest.mark.parametrize(
    "shares",
    [
        [[0, 1, 2, 3], [4, 5, 6, 7]],
        [[0, 4], [1, 5], [2, 6], [3, 7]],  # a mesh may interleave the hosts' rows
        [[0, 1, 2, 3, 4, 5, 6, 7]] * 2,  # hosts that shard the model, not the batch
        [[i] for i in range(8)],
    ],
)
def test_examples_and_augmentation_do_not_depend_on_the_number_of_hosts(shares):
    options = {"batch_size": 8, "seed": 3, "start": 2, "augment": jitter}
    everything = loader.part(Numbers(), **options, rows=list(range(8)))
    for rows in shares:
        share = loader.part(Numbers(), **options, rows=rows)
        for k in range(4):
            for name, x in share[k].items():
                np.testing.assert_array_equal(x, everything[k][name][rows])


def test_augmentation_differs_in_every_epoch():
    share = loader.part(Numbers(), batch_size=4, seed=0, start=0, augment=jitter, rows=[0, 1, 2, 3])
    drawn = np.concatenate([share[i]["random"] for i in range(500)])  # 100 epochs
    assert len(np.unique(drawn)) == len(drawn)
    assert abs(drawn.mean() - 0.5) < 0.03  # mean of 2,000 draws


def test_batches_ahead_take_at_most_a_quarter_of_the_memory(monkeypatch):
    monkeypatch.setattr(devices, "host_memory", lambda: 4_000)
    monkeypatch.setattr(loader.os, "cpu_count", lambda: 4)
    for batch_bytes, threads, ahead in ((1, 4, 8), (200, 4, 5), (500, 2, 2), (3_000, 1, 1)):
        options = loader._read_options(batch_bytes)
        assert (options.num_threads, options.prefetch_buffer_size) == (threads, ahead)
    everything = numbers(take(5))  # read one at a time
    monkeypatch.undo()
    assert everything == numbers(take(5))


def test_a_batch_that_cannot_fit_into_memory_is_refused(monkeypatch):
    assert loader.example_bytes(Numbers(), None) == 4
    assert loader.example_bytes(Numbers(), jitter) == 8
    monkeypatch.setattr(devices, "host_memory", lambda: 96)
    loader.check_fits(Numbers(), augment=None, num_rows=8)
    with pytest.raises(
        UserError, match="train.batch_size must fit into the memory of a host, .*9 "
    ):
        loader.check_fits(Numbers(), augment=None, num_rows=9)
    with pytest.raises(UserError, match="got 8 examples on a host, which take 1.92e-07 GB$"):
        loader.check_fits(Numbers(), augment=jitter, num_rows=8)
