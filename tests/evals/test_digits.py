import numpy as np
import pytest

from dit_jax.data import digits as data
from dit_jax.evals import digits


def with_labels(source, count):
    """Images of a source whose labels are `digits.labels(count)`."""
    pools = {label: source.image[source.label == label] for label in range(10)}
    labels = digits.labels(count)
    return np.stack([pools[label][(i // 10) % len(pools[label])] for i, label in enumerate(labels)])


def test_real_digits_get_good_scores():
    train, held_out = data.load()
    j = digits.judge(with_labels(held_out, 200), held_out.image)
    assert j["agreement"] > 0.98
    assert j["frechet_distance"] == pytest.approx(0, abs=1e-6)
    assert j["nearest_distance"] == pytest.approx(j["nearest_distance_held_out"])


def test_classifier_is_accurate_and_floor_is_the_score_of_training_digits():
    train, held_out = data.load()
    j = digits.judge(with_labels(train, 1000), train.image)
    assert j["classifier_accuracy"] >= 0.985
    assert j["frechet_distance"] == pytest.approx(j["frechet_floor"])
    assert j["frechet_floor"] == pytest.approx(0.562, abs=0.001)


def test_memorised_digits_have_distance_zero():
    train, _ = data.load()
    j = digits.judge(with_labels(train, 100), train.image)
    assert j["nearest_distance"] < 1e-6 < 1 < j["nearest_distance_held_out"]


def test_noise_and_wrong_classes_get_bad_scores():
    train, _ = data.load()
    noise = np.random.default_rng(0).integers(0, 256, (500, 8, 8, 1)).astype(np.uint8)
    swapped = np.roll(with_labels(train, 200), 1, axis=0)
    j = digits.judge(swapped, noise)
    assert j["agreement"] < 0.05
    assert j["frechet_distance"] > 10


def test_report_has_every_score():
    train, _ = data.load()
    text = digits.report(digits.judge(with_labels(train, 100), train.image))
    assert "100.0%" in text and text.count("0.562") == 2 and len(text.splitlines()) == 4


def test_agreement_is_judged_for_each_label():
    train, _ = data.load()
    images = with_labels(train, 200)
    wrong = digits.labels(200) == 4
    images[wrong] = np.roll(images, 1, axis=0)[wrong]  # threes
    j = digits.judge(images, train.image)
    assert j["agreement_by_label"] == [0.0 if label == 4 else 1.0 for label in range(10)]
    assert j["agreement"] == 0.9
    line = digits.report(j).splitlines()[1]
    assert line.split() == [
        *"agreement for label 0, 1, ...".split(),
        *4 * ["100%"],
        "0%",
        *5 * ["100%"],
    ]


def test_a_model_of_some_classes_is_judged_by_these():
    classes = (7, 3)
    train, held_out = data.load(classes)
    images = np.stack([train.image[train.label == y][i // 2] for i, y in enumerate([0, 1] * 50)])
    np.testing.assert_array_equal(digits.labels(3, classes), [0, 1, 0])
    j = digits.judge(images, held_out.image, classes)
    assert j["agreement_by_label"] == [1.0, 1.0] and j["classifier_accuracy"] > 0.98
    assert j["frechet_distance"] == pytest.approx(0, abs=1e-6)
