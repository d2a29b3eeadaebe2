import functools
import gzip

import numpy as np
import pytest

from dit_jax.data import fashion, feed
from dit_jax.errors import UserError
from dit_jax.runs import build


def idx(array):
    """The bytes of an IDX file."""
    header = bytes([0, 0, fashion.UINT8, array.ndim])
    return header + np.array(array.shape, ">u4").tobytes() + array.tobytes()


# Without the time, so that all workers of pytest find the same names of tests.
pack = functools.partial(gzip.compress, mtime=0)


@pytest.fixture
def pictures():
    """{split: (images uint8 (N, 28, 28), labels (N,))}."""
    rng = np.random.default_rng(0)
    counts = {"train": 30, "test": 20}
    return {
        split: (rng.integers(0, 256, (n, 28, 28), np.uint8), np.arange(n, dtype=np.uint8) % 10)
        for split, n in counts.items()
    }


@pytest.fixture
def path(tmp_path, pictures):
    """A folder with the four files: those to train on gzipped, the others not."""
    for split, (images, labels) in pictures.items():
        word = fashion.SPLITS[split]
        for name, array in ((f"{word}-images-idx3", images), (f"{word}-labels-idx1", labels)):
            data, end = (pack(idx(array)), ".gz") if split == "train" else (idx(array), "")
            (tmp_path / f"{name}-ubyte{end}").write_bytes(data)
    return tmp_path


@pytest.mark.parametrize("split", ["train", "test"])
def test_examples_are_those_of_the_files(path, pictures, split):
    source, (images, labels) = fashion.load(path, split), pictures[split]
    assert len(source) == len(images)
    assert source[7]["image"].shape == (28, 28, 1) and source[7]["image"].dtype == np.uint8
    np.testing.assert_array_equal(source.image[..., 0], images)
    np.testing.assert_array_equal(source.label, labels)
    assert source.label.dtype == np.int32
    assert source.class_names[source[7]["label"]] == "Sneaker"


def test_the_config_fits_and_names_the_classes(path):
    from configs import fashion as config_of

    config = config_of.get_config()
    config.data.path = str(path)
    fed = feed.make(build.read(config))
    assert len(fed.source) == 30 and fed.class_names == fashion.CLASS_NAMES
    config.data.split = "validation"
    with pytest.raises(UserError, match="^data.split must be one of train, test, got 'validation'"):
        feed.make(build.read(config))


TRAIN_IMAGES, TRAIN_LABELS = "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"
IMAGES = np.zeros((30, 28, 28), np.uint8)
LABELS = np.arange(30, dtype=np.uint8) % 10


@pytest.mark.parametrize(
    "name, content, message",
    [
        (
            TRAIN_IMAGES,
            None,
            r"^data.path must be a folder with the IDX files .* launch/fashion.sh",
        ),
        (TRAIN_IMAGES, pack(idx(IMAGES))[:-9], "must be a whole gzip file: .* again$"),
        (TRAIN_IMAGES, pack(idx(IMAGES))[:12], "must be a whole gzip file: "),
        (TRAIN_IMAGES, b"<html>not found</html>", "must be a whole gzip file: Not a gzipped file"),
        (
            TRAIN_IMAGES,
            pack(idx(IMAGES)[:-5]),
            "must have 30 x 28 x 28 values, .* got 23515",
        ),
        (
            TRAIN_IMAGES,
            pack(idx(IMAGES) + b"0"),
            "must have 30 x 28 x 28 values, .* 23521:",
        ),
        (
            TRAIN_IMAGES,
            pack(idx(IMAGES[:0])),
            "must have 0 x 28 x 28 values, at least one",
        ),
        (TRAIN_IMAGES, pack(idx(LABELS)), "with 3 axes, got one .* 00 00 08 01"),
        (TRAIN_IMAGES, pack(idx(IMAGES)[:9]), "with 3 axes, got one .* 00 00 08 03"),
        (TRAIN_IMAGES, pack(b""), "with 3 axes, got one that begins with nothing"),
        (TRAIN_LABELS, pack(idx(LABELS[:29])), "a label for each of 30 images, got 29"),
        (TRAIN_LABELS, pack(idx(LABELS + 1)), "must have labels in 0 .. 9, got 10"),
    ],
)
def test_a_wrong_or_cut_file_is_one_clear_line(path, name, content, message):
    (path / name).unlink()
    if content is not None:
        (path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        fashion.load(path, "train")
    assert "\n" not in str(caught.value)
    assert content is None or name in str(caught.value)
