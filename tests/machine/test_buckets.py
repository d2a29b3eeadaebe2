"""Checkpoints and files in a bucket."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.checkpoint import steps, store
from dit_jax.errors import UserError
from dit_jax.machine import disk
from dit_jax.runs import keep, record
from dit_jax.runs import workdir as workdirs

TEMPLATE = {"w": jax.ShapeDtypeStruct((8, 100), jnp.float32)}


def tree(step):
    return {"w": jnp.arange(800.0).reshape(8, 100) + step}


def save(directory, *steps):
    with store.open_writer() as writer:
        for step in steps:
            store.save(writer, directory, step, {"params": tree(step)}, {"model": {"size": "Ti"}})


def restore(directory, step):
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    template = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), TEMPLATE
    )
    return store.restore(directory, step, {"params": template})["params"]["w"]


def names(storage, path):
    """The names of the objects under a path, relative to it."""
    prefix = str(path).removeprefix("gs://tests/") + "/"
    return [n.removeprefix(prefix) for n in storage.names("tests") if n.startswith(prefix)]


def test_newest_steps_are_kept_and_restored_bit_for_bit(storage, bucket_path):
    directory = bucket_path / "checkpoints"
    assert steps.latest(directory) is None
    with keep.Keeper(directory, newest=2) as keeper:
        for step in (1, 2, 3):
            keeper.save(step, {"params": tree(step)}, {"model": {"size": "Ti"}})
        keeper.wait()
    assert steps.saved(directory) == [2, 3]
    assert {name.split("/")[1] for name in names(storage, bucket_path)} == {"2", "3"}
    np.testing.assert_array_equal(restore(directory, 2), tree(2)["w"])
    assert steps.locate(str(bucket_path)) == (directory, 3)
    assert steps.locate(f"{directory}/2") == (directory, 2)
    assert store.read_meta(directory, 3, of="model")["step"] == 3


def test_a_flipped_bit_is_detected(storage, bucket_path):
    save(bucket_path, 1)
    name = max(
        (key for key in storage.objects if key[1].startswith(f"{bucket_path.name}/1/params/")),
        key=lambda key: len(storage.objects[key].content),
    )
    old = storage.objects[name]
    at = old.content.index(np.float32(417 + 1).tobytes())
    content = bytearray(old.content)
    content[at] ^= 1
    storage.objects[name] = old._replace(content=bytes(content), generation=old.generation + 1000)
    for read in (restore, store.verify):
        with pytest.raises(store.Damaged, match="is damaged|cannot be read"):
            read(bucket_path, 1)


@pytest.mark.parametrize("name", ["meta/metadata", "params/manifest.ocdbt"])
def test_a_refused_read_is_an_oserror_not_damage(storage, bucket_path, name):
    save(bucket_path, 1)
    storage.allow(read=lambda read: not read.endswith(name))
    with pytest.raises(OSError, match=f"checkpoint {bucket_path}/1 cannot be reached: (PERM|Forb)"):
        restore(bucket_path, 1)
    storage.allow(read=lambda read: False)
    with pytest.raises(OSError, match="403"):
        steps.latest(bucket_path)


def test_a_step_without_its_commit_object_is_incomplete_and_is_saved_again(storage, bucket_path):
    save(bucket_path, 1)
    storage.allow(write=lambda name: not name.endswith("/2/commit_success.txt"))
    with pytest.raises(Exception, match="403"):
        save(bucket_path, 2)
    storage.allow()
    assert "2/_CHECKPOINT_METADATA" in names(storage, bucket_path)
    assert steps.latest(bucket_path) == 1
    with pytest.raises(UserError, match="checkpoint must be a directory with a saved step, got"):
        steps.locate(f"{bucket_path}/2")
    steps.clean(bucket_path)
    assert {name.split("/")[0] for name in names(storage, bucket_path)} == {"1"}
    save(bucket_path, 2)
    assert steps.latest(bucket_path) == 2
    np.testing.assert_array_equal(restore(bucket_path, 2), tree(2)["w"])


def test_set_aside_moves_all_objects_of_a_step(storage, bucket_path):
    directory = bucket_path / "checkpoints"
    save(directory, 1, 2)
    before = [n for n in names(storage, directory) if n.startswith("2/")]
    assert steps.set_aside(directory, 2) == bucket_path / "damaged" / "2"
    assert steps.latest(directory) == 1
    assert names(storage, bucket_path / "damaged") == before
    save(directory, 2)
    assert steps.set_aside(directory, 2) == bucket_path / "damaged" / "2-again"


def test_a_step_can_be_copied_to_a_bucket_and_back(storage, bucket_path, tmp_path):
    save(tmp_path, 1)
    for file in (tmp_path / "1").rglob("*"):
        if file.is_file():
            (bucket_path / str(file.relative_to(tmp_path))).write_bytes(file.read_bytes())
    assert steps.latest(bucket_path) == 1
    np.testing.assert_array_equal(restore(bucket_path, 1), tree(1)["w"])
    for name in names(storage, bucket_path):
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_bytes((bucket_path / name).read_bytes())
    assert steps.latest(tmp_path / "out") == 1
    np.testing.assert_array_equal(restore(tmp_path / "out", 1), tree(1)["w"])


def test_objects_of_other_processes_are_listed_and_read(storage, bucket_path):
    (bucket_path / "a").write_text("a")
    assert [path.name for path in bucket_path.iterdir()] == ["a"]
    storage.write(("tests", f"{bucket_path.name}/b"), b"b")
    assert [path.name for path in bucket_path.iterdir()] == ["a", "b"]
    storage.write(("tests", f"{bucket_path.name}/b"), b"longer")
    assert (bucket_path / "b").read_text() == "longer"


def test_a_folder_created_in_the_web_console_is_empty(storage, bucket_path):
    storage.write(("tests", f"{bucket_path.name}/"), b"")
    assert disk.exists(bucket_path) and disk.children(bucket_path) == []
    workdirs.check(bucket_path, {})
    (bucket_path / bucket_path.name).write_text("x")
    assert disk.children(bucket_path) == [bucket_path / bucket_path.name]


def make_log(path, start=0):
    options = {"total_steps": 9, "batch_size": 1, "flops_per_step": 1, "peak_flops": None}
    return record.make_log(path, start=start, saved=lambda: None, **options)


# Orbax stops waiting for the other writes when one has failed; they may end after its event loop.
@pytest.mark.filterwarnings("ignore:Exception ignored:pytest.PytestUnraisableExceptionWarning")
def test_keeper_survives_refused_saves_and_cleans_up_after_them(storage, bucket_path):
    directory = bucket_path / "checkpoints"
    with keep.Keeper(directory, newest=1) as keeper:
        keeper.save(1, {"params": tree(1)}, {})
        keeper.wait()
        storage.allow(write=lambda name: False)
        keeper.save(2, {"params": tree(2)}, {})
        keeper.wait()
        assert keeper.poll() and "403" in keeper.failure and keeper.saved == 1
        storage.allow(write=lambda name: "/params/" not in name)
        keeper.save(3, {"params": tree(3)}, {})
        keeper.wait()
        assert keeper.poll() and keeper.saved == 1
        storage.allow()
        keeper.save(4, {"params": tree(4)}, {})
        keeper.wait()
    assert steps.saved(directory) == [4]
    assert {name.split("/")[0] for name in names(storage, directory)} == {"4"}
    store.verify(directory, 4)


def test_log_is_appended_and_a_second_writer_is_a_user_error(bucket_path):
    path, means = bucket_path / "metrics.jsonl", {"loss": 1.0, "mse": 1.0, "data_wait": 0.0}
    first = make_log(path)
    for step in (1, 2, 3):
        first(step, means, 1.0)
    record.plot_losses(path, bucket_path / "loss.png")
    assert (bucket_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    second = make_log(path, start=2)  # drops step 3
    with pytest.raises(UserError, match=f"not be written by another run, got {bucket_path}"):
        first(4, means, 1.0)
    second(3, means, 2.0)
    assert [line["step"] for line in record.read(path)] == [1, 2, 3]


def test_path_accepts_text_and_paths(storage, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert disk.path("~/run") == disk.path(tmp_path / "run") == tmp_path / "run"
    path = disk.path("gs://tests/a/b/")
    assert disk.path(path) == disk.absolute(path) == path
    assert str(path / "c") == "gs://tests/a/b/c"
    assert str(disk.bucket_of(path)) == "gs://tests"


@pytest.mark.parametrize(
    "text", ["s3://bucket/run", "gs://", "gs:///run", "gs:/bucket/run", "https://a/b"]
)
def test_another_scheme_is_a_user_error(text):
    with pytest.raises(UserError, match=f"must be on a disk or start with gs://BUCKET, got {text}"):
        disk.path(text)


def test_missing_gcsfs_is_a_user_error(monkeypatch):
    monkeypatch.setattr(disk.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs gcsfs: pip install -e .\[gcs\], got gs://a/b"):
        disk.path("gs://a/b")
