import numpy as np

from dit_jax.data import synthetic


def test_examples_are_functions_of_their_index():
    source = synthetic.Synthetic((4, 6, 3), 10)
    a, again, b = source[3], source[3], source[4]
    assert a["image"].shape == (4, 6, 3) and a["image"].dtype == np.float32
    np.testing.assert_array_equal(a["image"], again["image"])
    assert not np.array_equal(a["image"], b["image"])


def test_latents_are_standard_normal_and_labels_in_range():
    source = synthetic.Synthetic((32, 32, 4), 3)
    examples = [source[i] for i in range(50)]
    images = np.stack([e["image"] for e in examples])
    assert abs(images.mean()) < 0.01 and abs(images.std() - 1) < 0.01
    assert {int(e["label"]) for e in examples} == {0, 1, 2}
