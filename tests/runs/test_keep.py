"""Which saved steps a run keeps, and what a failed save leaves behind."""

import jax.numpy as jnp
import pytest

from dit_jax.checkpoint import steps, store
from dit_jax.runs import keep


def items(step):
    return {"params": {"x": jnp.full((8, 16), float(step))}}


def save(keeper, *steps, losses=None):
    for step in steps:
        keeper.save(step, items(step), {"loss": losses[step] if losses else 1.0})
    keeper.wait()


def assert_complete(directory, expected):
    assert steps.saved(directory) == list(expected)
    for step in expected:
        store.verify(directory, step)


@pytest.fixture
def no_pause(monkeypatch):
    monkeypatch.setattr(keep, "PAUSE", 0)


def test_the_newest_and_the_best_are_kept(tmp_path):
    losses = {1: 5.0, 2: 1.0, 3: 4.0, 4: 2.0, 5: 3.0, 6: 9.0}
    with keep.Keeper(tmp_path, newest=2, best=2) as keeper:
        save(keeper, *losses, losses=losses)
    assert keeper.saved == 6
    assert_complete(tmp_path, [2, 4, 5, 6])


def test_the_best_by_another_measure_are_kept(tmp_path):
    """A step without it, as one that a signal saved, is not the best."""
    scores = {1: 3.0, 2: None, 3: 1.0, 4: 2.0, 5: 4.0}
    with keep.Keeper(tmp_path, newest=1, best=1, best_by="score") as keeper:
        for step, score in scores.items():
            meta = {"loss": 9.0 - step} | ({"score": score} if score else {})
            keeper.save(step, items(step), meta)
        keeper.wait()
    assert_complete(tmp_path, [3, 5])


def test_a_step_is_read_back_before_an_older_one_is_deleted(tmp_path, monkeypatch):
    seen, verify = [], store.verify

    def record_and_verify(directory, step, **options):
        seen.append(steps.saved(directory))
        verify(directory, step, **options)

    monkeypatch.setattr(store, "verify", record_and_verify)
    with keep.Keeper(tmp_path, newest=1) as keeper:
        save(keeper, 1, 2, 3)
    assert seen == [[1], [1, 2], [2, 3]]
    assert_complete(tmp_path, [3])


def test_a_step_that_reads_back_differently_is_set_aside_and_nothing_is_deleted(
    tmp_path, monkeypatch, caplog
):
    directory, verify = tmp_path / "checkpoints", store.verify

    def flip(directory, step, **options):
        if step == 2:
            files = [p for p in (directory / "2" / "params").rglob("d/*") if p.is_file()]
            largest = max(files, key=lambda path: path.stat().st_size)
            data = bytearray(largest.read_bytes())
            data[len(data) // 2] ^= 1
            largest.write_bytes(data)
        verify(directory, step, **options)

    monkeypatch.setattr(store, "verify", flip)
    with keep.Keeper(directory, newest=1) as keeper:
        save(keeper, 1, 2)
        assert keeper.poll() and keeper.saved == 1
        assert_complete(directory, [1])
        save(keeper, 3)
    assert keeper.failure is None and keeper.saved == 3
    assert_complete(directory, [3])
    assert (tmp_path / "damaged" / "2").is_dir()
    assert "step 2 could not be saved: checkpoint " in caplog.text


def test_without_verification_nothing_is_read_back(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "verify", None)
    with keep.Keeper(tmp_path, newest=1, verify=False) as keeper:
        save(keeper, 1, 2)
    assert steps.saved(tmp_path) == [2]


def test_a_failed_save_leaves_no_trace_and_the_next_one_works(tmp_path, monkeypatch, caplog):
    write = store.save

    def fail(writer, directory, step, items, meta):
        (directory / f"{step}.orbax-checkpoint-tmp").mkdir()
        raise OSError("No space left on device")

    with keep.Keeper(tmp_path, newest=1) as keeper:
        save(keeper, 1)
        monkeypatch.setattr(store, "save", fail)
        save(keeper, 2)
        assert keeper.poll() and keeper.failure == "No space left on device"
        assert [path.name for path in tmp_path.iterdir()] == ["1"]
        monkeypatch.setattr(store, "save", write)
        save(keeper, 3)
        assert not keeper.poll()
    assert_complete(tmp_path, [3])
    assert "step 2 could not be saved: No space left on device" in caplog.text


def test_an_unwritable_directory_is_a_failure_and_not_an_exception(tmp_path):
    (tmp_path / "file").touch()
    with keep.Keeper(tmp_path / "file" / "checkpoints", newest=1) as keeper:
        save(keeper, 1)
        assert keeper.poll() and "Not a directory" in keeper.failure
        (tmp_path / "file").unlink()
        save(keeper, 2)
    assert_complete(tmp_path / "file" / "checkpoints", [2])


def test_the_final_save_is_repeated_when_it_fails(tmp_path, monkeypatch, no_pause):
    write, calls = store.save, []

    def fail_twice(*args):
        calls.append(args)
        if len(calls) < 3:
            raise OSError("busy")
        write(*args)

    monkeypatch.setattr(store, "save", fail_twice)
    with keep.Keeper(tmp_path, newest=1) as keeper:
        keeper.save_now(1, items(1), {})
        assert keeper.failure is None
    assert len(calls) == 3
    assert_complete(tmp_path, [1])


def test_the_final_save_gives_up_after_its_attempts(tmp_path, monkeypatch, no_pause):
    monkeypatch.setattr(store, "save", lambda *_: (_ for _ in ()).throw(OSError("busy")))
    with keep.Keeper(tmp_path, newest=1) as keeper:
        keeper.save_now(1, items(1), {})
        assert keeper.failure == "busy"
    assert steps.saved(tmp_path) == []


def test_leftovers_of_a_killed_run_are_removed(tmp_path):
    (tmp_path / "7.orbax-checkpoint-tmp").mkdir()
    (tmp_path / ".deleted-3").mkdir()
    with keep.Keeper(tmp_path, newest=1) as keeper:
        save(keeper, 8)
    assert [path.name for path in tmp_path.iterdir()] == ["8"]
