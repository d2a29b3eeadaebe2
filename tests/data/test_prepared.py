import io
import shutil

import numpy as np
import pictures
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from dit_jax.data import imagefolder, images, loader, prepare, prepared
from dit_jax.errors import UserError


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """A prepared dataset of 18 images of 3 classes, and the bytes of its files."""
    path = tmp_path_factory.mktemp("prepared")
    files = pictures.draw(path / "tree")
    prepare.write(path / "data", "train", imagefolder.scan(path / "tree"), num_shards=2)
    return path / "data", files


def test_example_is_the_crop_of_its_file(dataset):
    path, files = dataset
    source = prepared.open_images(path, "train", 16)
    assert len(source) == 18 and source.class_names == ("c0", "c1", "c2")
    for i in range(18):
        name = source.records[i]["file_name"].decode()
        with Image.open(io.BytesIO(files[name])) as image:
            expected = images.center_crop(image.convert("RGB"), 16)
        np.testing.assert_array_equal(source[i]["image"], expected)
        assert source[i]["label"] == int(name[1])


def test_a_small_dataset_is_decoded_once(dataset, monkeypatch):
    calls = []
    decode = images.decode
    monkeypatch.setattr(images, "decode", lambda data: calls.append(0) or decode(data))
    source = prepared.open_images(dataset[0], "train", 16)
    first = [source[i]["image"] for i in (3, 4, 3)]
    np.testing.assert_array_equal(first[0], first[2])
    assert len(calls) == 2
    source[3]["label"] = 7  # of a copy
    assert source[3]["label"] != 7
    monkeypatch.setattr(prepared, "MOST_DECODED", 18 * 16 * 16 * 3 - 1)
    large = prepared.open_images(dataset[0], "train", 16)
    assert [large[3]["label"] for _ in range(3)] == 3 * [source[3]["label"]]
    assert len(calls) == 5


class Toy(tfds.core.GeneratorBasedBuilder):
    """A dataset that tensorflow-datasets itself prepares, like imagenet2012."""

    VERSION = tfds.core.Version("1.0.0")
    files = {}  # {class/file: bytes}

    def _info(self):
        features = {
            "image": tfds.features.Image(encoding_format="jpeg"),
            "label": tfds.features.ClassLabel(num_classes=3),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for name, data in self.files.items():
            yield name, {"image": io.BytesIO(data), "label": int(name[1])}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"file_format": "tfrecord"}, "must be stored as array_record, got tfrecord in .*: build"),
        ({"without": "label"}, "must have a feature label of the type ClassLabel, got only image"),
        ({"without": "image"}, "must have a feature image of the type Image, got only label"),
        ({"label": np.int64}, "must have a feature label of the type ClassLabel, got Tensor in"),
    ],
)
def test_a_dataset_that_cannot_be_trained_on_is_refused(tmp_path, change, message):
    features = {
        "image": tfds.features.Image(encoding_format="jpeg"),
        "label": change.get("label", tfds.features.ClassLabel(names=["ant", "bee"])),
    }
    features.pop(change.get("without"), None)
    kind = change.get("file_format", "array_record")
    template = tfds.core.ShardedFileTemplate(
        data_dir=tmp_path, dataset_name="d", split="train", filetype_suffix=kind
    )
    template.sharded_filepath(shard_index=0, num_shards=1).touch()
    tfds.folder_dataset.write_metadata(
        data_dir=tmp_path,
        features=tfds.features.FeaturesDict(features),
        split_infos=[
            tfds.core.SplitInfo(
                name="train", shard_lengths=[1], num_bytes=1, filename_template=template
            )
        ],
        check_data=False,
    )
    with pytest.raises(UserError, match=f"^dataset {message}"):
        prepared.open_images(tmp_path, "train", 16)


def test_dataset_of_tensorflow_datasets_opens_unchanged(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(Toy, "files", dataset[1])
    builder = Toy(data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare()
    source = prepared.open_images(builder.data_path, "train", 16)
    assert len(source) == 18 and source.num_classes == 3
    labels = [int(source[i]["label"]) for i in range(18)]
    assert sorted(labels) == [0] * 6 + [1] * 6 + [2] * 6
    crops = [images.center_crop(images.decode(data), 16) for data in dataset[1].values()]
    assert all(any(np.array_equal(source[i]["image"], crop) for crop in crops) for i in range(18))


def test_corrupt_image_in_a_dataset_of_tensorflow_datasets_raises(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(Toy, "files", {"c0/a.jpg": dataset[1]["c0/000.jpg"][:300]})
    builder = Toy(data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare()
    source = prepared.open_images(builder.data_path, "train", 16)
    share = loader.part(source, batch_size=1, seed=0, start=0, augment=None, rows=[0])
    with pytest.raises(UserError, match="example 0 of .*/toy/1.0.0: image must be a whole image"):
        next(iter(share.to_iter_dataset()))


def test_warning_counts_images_that_the_crop_enlarges(dataset, caplog):
    path, files = dataset
    sides = [min(Image.open(io.BytesIO(data)).size) for data in files.values()]
    prepared.warn_of_small(prepared.open_images(path, "train", min(sides)))
    assert not caplog.messages
    source = prepared.open_images(path, "train", 40)
    prepared.warn_of_small(source)
    (line,) = caplog.messages
    few = sum(side < 40 for side in sides)
    assert 0 < few < 18
    assert f"{few} of 18 images are smaller than the 40-pixel crop and are enlarged" in line
    assert f"(smallest: {min(sides)})" in line
    assert source[0]["image"].shape == (40, 40, 3)


def test_half_of_the_draws_are_flipped_for_every_example(dataset):
    source = prepared.open_images(dataset[0], "train", 16)
    plain = [source[i]["image"] for i in range(18)]
    share = loader.part(
        source,
        batch_size=18,
        seed=0,
        start=0,
        augment=prepared.flip_at_random,
        rows=list(range(18)),
    )
    flips = np.zeros(18)
    for epoch in range(60):
        for image in share[epoch]["image"]:
            if not any(np.array_equal(x, image) for x in plain):
                ((i, _),) = [
                    (i, x) for i, x in enumerate(plain) if np.array_equal(images.flip(x), image)
                ]
                flips[i] += 1
    assert abs(flips.sum() / (60 * 18) - 0.5) < 0.05  # 1,080 draws
    assert flips.min() > 10 and flips.max() < 50  # per example, of 60


def test_directory_that_cannot_be_read_raises(dataset, tmp_path):
    with pytest.raises(
        UserError, match="dataset must be a directory written by dit-prepare or .* got"
    ):
        prepared.open_images(tmp_path, "train", 16)
    with pytest.raises(UserError, match="^split must be one of train, got 'test'"):
        prepared.open_images(dataset[0], "test", 16)
    shutil.copytree(dataset[0], tmp_path / "cut")
    shard = next((tmp_path / "cut").glob("*.array_record-00001*"))
    size = shard.stat().st_size
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(
        UserError, match=f"must have {size} bytes, got {size - 100}: repeat the command that wrote"
    ):
        prepared.open_images(tmp_path / "cut", "train", 16)
    shard.unlink()
    with pytest.raises(UserError, match=f"must have {size} bytes, got no file: repeat the command"):
        prepared.open_images(tmp_path / "cut", "train", 16)
