import hashlib
import os

import pytest
from array_record.python import array_record_data_source

from dit_jax.data import arrayrecord
from dit_jax.errors import UserError

RECORDS = [b"first", b"", bytes(1000)]
NAME = "x.array_record-00000-of-00001"


@pytest.fixture
def shard(tmp_path):
    """The path of a shard with RECORDS, and its entry."""
    path = tmp_path / NAME
    partial = arrayrecord.partial_path(path)
    with arrayrecord.open_writer(partial) as writer:
        for record in RECORDS:
            writer.write(record)
    assert not path.exists()
    return path, arrayrecord.seal(partial, path)


def test_records_are_read_as_written(shard):
    records = array_record_data_source.ArrayRecordDataSource([str(shard[0])])
    assert [arrayrecord.read_record(records, i, shard[0]) for i in range(3)] == RECORDS


def test_seal_renames_the_partial_file_and_returns_size_and_sha256(shard):
    path, entry = shard
    assert [child.name for child in path.parent.iterdir()] == [NAME]
    data = path.read_bytes()
    assert entry == {"file_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def test_partial_path_is_hidden_beside_the_shard_and_differs_between_processes(tmp_path):
    partial = arrayrecord.partial_path(tmp_path / NAME)
    assert partial.parent == tmp_path and partial.name == f".partial-{os.getpid()}-{NAME}"


def test_failed_write_raises_os_error():
    with pytest.raises(OSError, match="/dev/full cannot be written: .*; finished shards are kept"):
        with arrayrecord.open_writer("/dev/full") as writer:
            writer.write(bytes(100))


def test_missing_or_cut_shard_is_not_whole_and_raises(shard):
    path, entry = shard
    size = entry["file_bytes"]
    assert arrayrecord.is_whole(path, entry)
    arrayrecord.check_files(path.parent, {NAME: entry})
    path.write_bytes(path.read_bytes()[:-1])
    assert not arrayrecord.is_whole(path, entry)
    message = f"{NAME} must have {size} bytes, got {size - 1}: repeat the command that wrote it"
    with pytest.raises(UserError, match=message):
        arrayrecord.check_files(path.parent, {NAME: entry})
    path.unlink()
    assert not arrayrecord.is_whole(path, entry)
    with pytest.raises(UserError, match=f"must have {size} bytes, got no file"):
        arrayrecord.check_files(path.parent, {NAME: entry})


def test_check_digest_finds_a_flipped_bit(shard):
    path, entry = shard
    arrayrecord.check_digest(path, entry)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert arrayrecord.is_whole(path, entry)
    message = f"{NAME} is damaged: its sha256 is not {entry['sha256']}"
    with pytest.raises(UserError, match=message):
        arrayrecord.check_digest(path, entry)
    path.write_bytes(data[:-1])
    with pytest.raises(UserError, match="must have"):
        arrayrecord.check_digest(path, entry)


def test_reading_a_corrupt_record_names_the_example_and_the_dataset(shard):
    path, _ = shard
    data = path.read_bytes()
    start = data.index(b"first")
    path.write_bytes(data[:start] + b"fIrst" + data[start + 5 :])
    records = array_record_data_source.ArrayRecordDataSource([str(path)])
    message = "example 0 of data/set cannot be read: its shard is damaged, copy it again: "
    with pytest.raises(UserError, match=message):
        arrayrecord.read_record(records, 0, "data/set")


def test_leftovers_are_removed_and_shards_are_kept(shard):
    path, _ = shard
    folder, notes = path.parent, path.parent / arrayrecord.PROGRESS
    notes.mkdir()
    for partial in (folder / ".partial-1-a", notes / ".partial-2-b", notes / "a.json"):
        partial.touch()
    arrayrecord.remove_partials(folder)
    assert {child.name for child in folder.iterdir()} == {NAME, arrayrecord.PROGRESS}
    assert [child.name for child in notes.iterdir()] == ["a.json"]
    arrayrecord.remove_notes(folder)
    arrayrecord.remove_notes(folder)  # nothing to remove
    assert [child.name for child in folder.iterdir()] == [NAME]
