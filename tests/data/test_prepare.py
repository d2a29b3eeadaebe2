import collections
import hashlib
import shutil
import sys

import numpy as np
import pictures
import pytest
import tensorflow_datasets as tfds

from dit_jax.data import arrayrecord, imagefolder, images, prepare
from dit_jax.errors import UserError


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def write(source, out, split="train", **options):
    return prepare.write(out, split, imagefolder.scan(source), **options)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A folder tree with 18 images of 3 classes, and the bytes of its files."""
    path = tmp_path_factory.mktemp("source") / "tree"
    return path, pictures.draw(path)


@pytest.fixture(scope="module")
def finished(tree, tmp_path_factory):
    """A finished directory with 4 shards."""
    out = tmp_path_factory.mktemp("out") / "data"
    write(tree[0], out, num_shards=4, processes=2)
    return out


def test_tensorflow_datasets_opens_the_original_bytes(tree, finished):
    builder = tfds.builder_from_directory(finished)
    assert builder.info.splits["train"].num_examples == 18
    assert builder.info.features["label"].names == ["c0", "c1", "c2"]
    raw = builder.as_data_source("train", decoders={"image": tfds.decode.SkipDecoding()})
    names = [example["file_name"].decode() for example in raw]
    assert sorted(names) == sorted(tree[1]) and names != sorted(names)
    for example in raw:
        name = example["file_name"].decode()
        assert example["image"] == tree[1][name] and example["label"] == int(name[1])
    assert np.asarray(images.decode(raw[0]["image"])).ndim == 3
    assert "tensorflow" not in sys.modules


def test_manifest_has_counts_and_the_sha256_of_every_shard(tree, finished):
    split = prepare.read_manifest(finished)["splits"]["train"]
    assert split["num_examples"] == 18 and split["classes"] == {"c0": 6, "c1": 6, "c2": 6}
    assert len(split["shards"]) == 4 and split["corrupt"] == []
    sides = collections.Counter(str(min(images.decode(data).size)) for data in tree[1].values())
    assert split["short_sides"] == sides
    for name, shard in split["shards"].items():
        data = (finished / name).read_bytes()
        assert shard["sha256"] == hashlib.sha256(data).hexdigest()
        assert shard["file_bytes"] == len(data)


def test_bytes_do_not_depend_on_the_number_of_processes(tree, finished, tmp_path):
    progress = []
    write(tree[0], tmp_path / "x", num_shards=4, on_progress=lambda *args: progress.append(args))
    assert contents(tmp_path / "x") == contents(finished)
    assert sum(count for count, _ in progress) == 18 and all(is_new for _, is_new in progress)


def test_finished_split_is_not_written_again(tree, finished):
    progress, before = [], contents(finished)
    manifest = write(tree[0], finished, on_progress=lambda *args: progress.append(args))
    assert progress == [] and contents(finished) == before
    assert manifest["num_examples"] == 18


def test_lost_files_of_a_finished_directory_are_written_again(tree, finished, tmp_path):
    out = tmp_path / "data"
    shutil.copytree(finished, out)
    one, two = sorted(out.glob("*.array_record*"))[:2]
    one.unlink()
    two.write_bytes(two.read_bytes()[:-100])
    (out / "dataset_info.json").write_text("{")
    write(tree[0], out)  # takes the number of shards from the manifest
    assert contents(out) == contents(finished)


def test_changed_image_of_the_same_size_is_noticed_when_its_shard_is_repaired(tree, tmp_path):
    source, out = tmp_path / "tree", tmp_path / "data"
    shutil.copytree(tree[0], source)
    write(source, out, num_shards=1)
    next(out.glob("*.array_record*")).unlink()
    path = source / "c0" / "000.jpg"
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(
        UserError, match="source must be the images of .*, got others: images-train"
    ):
        write(source, out)


def test_second_split_must_have_the_same_classes(tree, tmp_path):
    out = tmp_path / "data"
    write(tree[0], out)
    write(tree[0], out, "validation")
    assert set(tfds.builder_from_directory(out).info.splits) == {"train", "validation"}
    pictures.draw(tmp_path / "two", num_classes=2)
    before = contents(out)
    message = "classes must be the same as in .*, but only one of both has c2"
    with pytest.raises(UserError, match=message):
        write(tmp_path / "two", out, "test")
    message = "split must be a new name in .*, got train, which has other images"
    with pytest.raises(UserError, match=message):
        write(tmp_path / "two", out)
    assert contents(out) == before


def test_number_of_shards_of_a_finished_split_cannot_change(tree, finished):
    before = contents(finished)
    with pytest.raises(UserError, match="num_shards must be 4, as in the finished train of"):
        write(tree[0], finished, num_shards=3)
    assert contents(finished) == before


def test_number_of_shards_is_at_most_the_number_of_images(tree, tmp_path):
    with pytest.raises(UserError, match="num_shards must be at most 18, got 19"):
        write(tree[0], tmp_path / "out", num_shards=19)
    assert not (tmp_path / "out").exists()


def test_a_class_without_an_image_that_can_be_decoded_is_refused(tree, tmp_path):
    source = shutil.copytree(tree[0], tmp_path / "tree")
    (source / "new").mkdir()
    (source / "new" / "text.png").write_text("text")
    message = "an image that can be decoded, got none for new: new/text.png: image must be a whole"
    with pytest.raises(UserError, match=message):
        write(source, tmp_path / "out", max_corrupt=1)
    assert prepare.read_manifest(tmp_path / "out")["splits"] == {}


def test_corrupt_files_are_skipped_up_to_a_limit(tree, tmp_path):
    source = tmp_path / "tree"
    pictures.draw(source)
    (source / "c1" / "cut.jpg").write_bytes(tree[1]["c1/000.jpg"][:300])
    (source / "c2" / "text.png").write_text("text")
    (source / "c2" / "notes.txt").write_text("text")
    message = (
        "max_corrupt must be at least 0.1, got 0.05: at least 2 of 20 files cannot be decoded, "
        "for example c./.*: image must be a whole image file: "
    )
    with pytest.raises(UserError, match=message):
        write(source, tmp_path / "no", max_corrupt=0.05)  # 1 of 20
    split = write(source, tmp_path / "out", max_corrupt=0.1)
    assert split["num_examples"] == 18 and split["ignored"] == 1
    assert [name for name, _ in split["corrupt"]] == ["c1/cut.jpg", "c2/text.png"]
    write(source, tmp_path / "again", max_corrupt=0.1)
    assert contents(tmp_path / "again") == contents(tmp_path / "out")


def test_unfinished_directory_is_resumed_with_the_same_images_only(tree, tmp_path):
    def stop(count, is_new):
        raise InterruptedError

    with pytest.raises(InterruptedError):
        write(tree[0], tmp_path / "out", num_shards=4, on_progress=stop)
    message = "OUT must be new or unfinished with the same images and num_shards, got .*: delete it"
    with pytest.raises(UserError, match=message):
        write(tree[0], tmp_path / "out", num_shards=3)


def test_folder_whose_images_were_refused_takes_other_images(tree, finished, tmp_path):
    (tmp_path / "bad" / "c0").mkdir(parents=True)
    (tmp_path / "bad" / "c0" / "x.jpg").write_text("text")
    with pytest.raises(UserError, match="max_corrupt must be at least 1, got 0.001"):
        write(tmp_path / "bad", tmp_path / "out")
    write(tree[0], tmp_path / "out", num_shards=4)
    assert contents(tmp_path / "out") == contents(finished)


def test_finished_shards_of_an_unfinished_directory_are_kept(tree, finished, tmp_path):
    progress = []

    def stop_after_two(count, is_new):
        progress.append(is_new)
        if len(progress) == 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        write(tree[0], tmp_path / "x", num_shards=4, on_progress=stop_after_two)
    notes = tmp_path / "x" / arrayrecord.PROGRESS
    assert len(list(notes.glob("images-*.json"))) >= 2
    progress.clear()
    write(tree[0], tmp_path / "x", num_shards=4, on_progress=lambda _, new: progress.append(new))
    assert len(progress) == 4 and progress.count(False) >= 2
    assert contents(tmp_path / "x") == contents(finished)


def test_folder_with_other_files_is_refused(tree, tmp_path):
    (tmp_path / "thesis.txt").write_text("years")
    message = "OUT must be new, empty or written by dit-prepare, got .* with thesis.txt"
    with pytest.raises(UserError, match=message):
        write(tree[0], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
