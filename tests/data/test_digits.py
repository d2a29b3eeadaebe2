import numpy as np
from sklearn import datasets

from dit_jax.data import digits


def test_split_is_disjoint_complete_and_fixed():
    train, held_out = digits.load()
    assert (len(train), len(held_out)) == (1500, 297)
    assert train.image.shape == (1500, 8, 8, 1) and train.image.dtype == np.uint8
    assert (train.image.min(), train.image.max()) == (0, 255)
    pixels = np.concatenate([train.image, held_out.image]).reshape(1797, -1)
    assert len(np.unique(pixels, axis=0)) == 1797
    again, _ = digits.load()
    np.testing.assert_array_equal(again.image, train.image)


def test_images_and_labels_are_those_of_scikit_learn():
    pixels, label = datasets.load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(label))
    parts = digits.load()
    image = np.concatenate([part.image for part in parts]).reshape(1797, 64)
    np.testing.assert_array_equal(image, np.rint(pixels[order] * (255 / 16)))
    np.testing.assert_array_equal(np.concatenate([p.label for p in parts]), label[order])


def test_both_parts_have_every_class():
    for part in digits.load():
        counts = np.bincount(part.label, minlength=10)
        assert len(counts) == 10 and counts.min() >= 0.07 * len(part)


def test_some_classes_get_new_labels_in_their_order():
    for part, whole in zip(digits.load((7, 0, 3)), digits.load(), strict=True):
        chosen = np.isin(whole.label, (7, 0, 3))
        np.testing.assert_array_equal(part.image, whole.image[chosen])
        np.testing.assert_array_equal(np.array([7, 0, 3])[part.label], whole.label[chosen])
        assert part.label.dtype == np.int32
        assert part.class_names == ("7", "0", "3") and whole.class_names == tuple("0123456789")


def test_example_is_an_image_and_its_label():
    train, _ = digits.load()
    example = train[7]
    assert example["image"].shape == (8, 8, 1)
    assert example["label"] == train.label[7]
