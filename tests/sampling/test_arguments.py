import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.errors import UserError
from dit_jax.models import dit
from dit_jax.sampling import arguments

CONFIG = dit.configure("Ti", 4, input_size=(8, 8), in_channels=1, num_classes=3)
X = np.ones((2, 8, 8, 1))


def read(values, config=CONFIG, limit=3):
    return arguments.read_labels("labels", values, limit, config)


def call(x, t, y, config=CONFIG):
    return arguments.of_call(x, t, y, config=config, last_time=999)


def test_labels_become_int32_and_weights_float32_with_a_column_for_the_null_label():
    labels = read([2, 0])
    assert labels.dtype == np.int32 and labels.tolist() == [2, 0]
    for weights in ([[0.5, 0.5, 0.0]], np.array([[0.5, 0.5, 0]], np.float16)):
        assert read(weights).dtype == np.float32
        np.testing.assert_array_equal(read(weights), [[0.5, 0.5, 0, 0]])
    assert read(np.eye(3, dtype=int), CONFIG._replace(null_label=False)).shape == (3, 3)


@pytest.mark.parametrize(
    "values, message",
    [
        (np.ones((2, 4)), r"whole numbers, or weights of shape \(N, 3\), got shape \(2, 4\)"),
        (np.ones((0, 3)), r"or weights of shape \(N, 3\), got shape \(0, 3\)"),
        (np.ones((1, 3, 1)), "labels must be a list of whole numbers, got"),
        ([[0.5, 0.7, 0.0]], "labels must have weights that sum to 1 in each row, got 1.2"),
        ([[1, 0, 0], [0, 0, 0]], "labels must have weights that sum to 1 in each row, got 0"),
        ([[1.5, -0.5, 0.0]], "labels must have weights in 0 .. 1, got 1.5"),
        ([[np.nan, 0, 1]], "labels must have weights in 0 .. 1, got nan"),
        ([["a", "b", "c"]], r"labels must be an array of numbers, got \[\['a', 'b', 'c'\]\]"),
        ([0.5] * 1000, r"list of whole numbers, got \[0.5, 0.5, 0.5, 0.5, 0.5, 0.5, \.\.\.\]$"),
    ],
)
def test_labels_and_weights_that_do_not_fit_are_named(values, message):
    with pytest.raises(UserError, match=message):
        read(values)


def test_a_call_gets_float32_and_a_time_for_each_example():
    x, t, y = call(X, 3, jnp.asarray([0, 3]))
    assert (x.dtype, t.dtype, y.dtype) == (np.float32, np.float32, np.int32)
    np.testing.assert_array_equal(t, [3, 3])
    traced = jax.eval_shape(call, X, 0.5, jnp.asarray([[0.5, 0.5, 0]] * 2))
    assert [z.shape for z in traced] == [(2, 8, 8, 1), (2,), (2, 4)]
    assert {z.dtype for z in traced} == {np.dtype(np.float32)}


@pytest.mark.parametrize(
    "t, y, message",
    [
        ([1, 2, 3], [0, 1], r"got \(2, 8, 8, 1\), \(3,\) and \(2,\)"),
        ([[1], [2]], [0, 1], r"got \(2, 8, 8, 1\), \(2, 1\) and \(2,\)"),
        (5, 0, r"\(N,\), or \(\) for t and \(N, 3\) for y, N at least 1, got .*, \(\) and \(\)"),
        (1000, [0, 1], "t must be in 0 .. 999, got 1000"),
        (-0.5, [0, 1], "t must be in 0 .. 999, got -0.5"),
        (10**22, [0, 1], "t must be an array of numbers, got 10000000000000000000000"),
        (True, [0, 1], "t must be an array of numbers, got True"),
        (1j, [0, 1], "t must be an array of numbers, got 1j"),
        (1, np.ones((2, 2)), r"y must be .*, or weights of shape \(N, 3\), got shape \(2, 2\)"),
        (1, [0, 4], "y must be in 0 .. 3, got 4"),
    ],
)
def test_a_call_that_does_not_fit_is_named(t, y, message):
    with pytest.raises(UserError, match=message):
        call(X, t, y)


def test_pixels_are_not_in_model_units():
    pixels = X.astype(np.uint8)
    with pytest.raises(UserError, match="^x must be in model units, about -1 .. 1, got pixels in"):
        call(pixels, 3, [0, 1])
    with pytest.raises(UserError, match="^noise must be in model units, about -1 .. 1, got pixels"):
        arguments.read_grid("noise", pixels, X.shape)


@pytest.mark.parametrize("value", [0, -1, 2.0, True, None, "3", np.float32(2)])
def test_a_number_that_is_not_whole_or_too_small_is_named(value):
    with pytest.raises(UserError, match="size must be a whole number of at least 1, got "):
        arguments.check_whole("size", value, 1)
