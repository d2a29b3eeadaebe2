from dit_jax.machine import words


def test_one_thing_is_singular():
    assert words.count(1, "image") == "1 image"
    assert [words.count(n, "image") for n in (0, 2)] == ["0 images", "2 images"]
    assert [words.count(n, "class", "classes") for n in (1, 3)] == ["1 class", "3 classes"]
