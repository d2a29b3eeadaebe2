"""A checkpoint gets names of labels only if someone states them or a file has them."""

import json

import pytest

from dit_jax.convert import class_names
from dit_jax.errors import UserError
from dit_jax.sampling import imagenet


def test_nothing_stated_is_no_names():
    assert class_names.read(None, 1000) == {}


def test_a_file_has_a_name_on_each_line(tmp_path):
    path = tmp_path / "names.txt"
    path.write_text("cat\nred circle \nJürgen\n", encoding="utf-8")
    assert class_names.read(str(path), 3) == {"class_names": ["cat", "red circle", "Jürgen"]}


@pytest.mark.parametrize(
    "content, message",
    [
        (b"cat\ndog\n", "class_names must have 3 names, one for each class, got 2 in .*names.txt$"),
        (
            b"cat\ndog\ncat\n",
            "class_names must be different names, got 'cat' twice in .*names.txt$",
        ),
        (b"cat\n\ndog\n", "class_names must be different names, got an empty line in .*names.txt$"),
        (b"\xff\xfe\x00", "class_names must be imagenet or a text file, got .*names.txt$"),
    ],
)
def test_a_file_that_does_not_fit_is_one_line(tmp_path, content, message):
    (tmp_path / "names.txt").write_bytes(content)
    with pytest.raises(UserError, match=message):
        class_names.read(str(tmp_path / "names.txt"), 3)


def test_imagenet_is_for_a_thousand_classes():
    assert class_names.read("imagenet", 1000) == {"class_names": list(imagenet.names())}
    with pytest.raises(UserError, match="must have 10 names, one for each class, got 1,000 in ima"):
        class_names.read("imagenet", 10)


def pipeline(folder, texts):
    labels = {str(label): text for label, text in enumerate(texts)}
    (folder / "model_index.json").write_text(json.dumps({"id2label": labels}))
    return class_names.of_pipeline(folder, len(texts)).get("class_names")


def test_a_pipeline_of_imagenet_is_known_by_its_names_in_wordnet(tmp_path):
    texts = [", ".join(row) for row in imagenet.rows()]
    texts[134] = texts[517] = "crane"  # as in the official pipelines
    assert pipeline(tmp_path, texts) == list(imagenet.names())
    assert pipeline(tmp_path, imagenet.texts()) == list(imagenet.names())


def test_a_pipeline_has_names_of_its_own_or_only_numbers(tmp_path, caplog):
    assert class_names.of_pipeline(tmp_path, 3) == {}  # a transformer alone
    assert pipeline(tmp_path, ["cat", "dog, hound", "bird"]) == ["cat", "dog, hound", "bird"]
    assert pipeline(tmp_path, ["0", "1", "2"]) is None
    assert pipeline(tmp_path, [str(label) for label in range(1000)]) is None
    assert pipeline(tmp_path, ["cat", "cat", "bird"]) is None
    assert "has labels of the same name: the names are left out" in caplog.text


def test_a_pipeline_gets_names_or_numbers():
    assert class_names.for_pipeline((), 3) == ["0", "1", "2"]
    assert class_names.for_pipeline(("cat", "dog"), 2) == ["cat", "dog"]
    assert class_names.for_pipeline(imagenet.names(), 1000)[2].startswith("great white shark, whi")
