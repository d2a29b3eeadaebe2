import pytest

from dit_jax.machine import words


def test_one_thing_is_singular():
    assert words.count(1, "image") == "1 image"
    assert [words.count(n, "image") for n in (0, 2)] == ["0 images", "2 images"]
    assert [words.count(n, "class", "classes") for n in (1, 3)] == ["1 class", "3 classes"]


@pytest.mark.parametrize(
    "count, text",
    [(999, "999 B"), (2048, "2.05 kB"), (674_834_720, "675 MB"), (32e9, "32 GB"), (4e12, "4 TB")],
)
def test_a_size_has_a_unit(count, text):
    assert words.size(count) == text


@pytest.mark.parametrize(
    "paths, names",
    [
        (["runs/a"], ["a"]),
        (["runs/a", "/tmp/b/"], ["a", "b"]),
        (["x/a/run", "x/b/run", "c"], ["a/run", "b/run", "c"]),
        (["gs://one/run", "gs://two/run"], ["one/run", "two/run"]),
    ],
)
def test_the_ends_of_paths_tell_them_apart(paths, names):
    assert words.ends(paths) == names
