import numpy as np

from dit_jax.data import synthetic


def test_example_depends_on_its_index_only():
    source = synthetic.Synthetic((4, 6, 3), 10)
    a, again, b = source[3], source[3], source[4]
    assert a["x0"].shape == (4, 6, 3) and a["x0"].dtype == np.float32
    np.testing.assert_array_equal(a["x0"], again["x0"])
    assert not np.array_equal(a["x0"], b["x0"])


def test_x0_is_standard_normal_and_labels_are_in_range():
    source = synthetic.Synthetic((32, 32, 4), 3)
    examples = [source[i] for i in range(50)]
    x0 = np.stack([example["x0"] for example in examples])
    assert abs(x0.mean()) < 0.01 and abs(x0.std() - 1) < 0.01
    assert {int(example["label"]) for example in examples} == {0, 1, 2}
