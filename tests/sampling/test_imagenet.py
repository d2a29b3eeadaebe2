from pathlib import Path

import pytest
import tensorflow_datasets as tfds

from dit_jax.sampling import imagenet


@pytest.mark.parametrize(
    "label, name",
    [
        *(
            (0, "tench"),
            (1, "goldfish"),
            (22, "bald eagle"),
            (88, "macaw"),
            (207, "golden retriever"),
        ),
        *((250, "Siberian husky"), (279, "Arctic fox"), (360, "otter"), (387, "lesser panda")),
        *((417, "balloon"), (474, "cardigan"), (264, "Cardigan"), (933, "cheeseburger")),
        *((972, "cliff"), (974, "geyser"), (979, "valley"), (999, "toilet tissue")),
        *((134, "crane bird"), (517, "crane"), (638, "maillot"), (639, "tank suit")),
    ],
)
def test_names_are_in_the_order_of_the_labels(label, name):
    assert imagenet.names()[label] == name


def test_every_class_has_a_name_of_its_own():
    names = imagenet.names()
    assert len(names) == len(set(names)) == 1000
    assert all(name and name == name.strip() for name in (*names, *imagenet.synonyms()))


def test_synonyms_lead_to_their_classes():
    synonyms = imagenet.synonyms()
    assert synonyms["red panda"] == [387] and synonyms["panda"] == [387, 388]
    assert synonyms["teddy bear"] == [850] and synonyms["Ailurus fulgens"] == [387]


def test_the_names_of_the_folders_of_imagenet_are_ids_of_its_classes():
    path = Path(tfds.__file__).parent / "datasets" / "imagenet2012" / "labels.txt"
    ids = path.read_text().split()
    assert imagenet.named(ids) == imagenet.names()
    for others in (ids[1:], ids[::-1], ["cat", "dog"], []):
        assert imagenet.named(others) == tuple(others)


def test_texts_name_one_class_each():
    texts = [text.split(", ") for text in imagenet.texts()]
    assert tuple(row[0] for row in texts) == imagenet.names()
    known = [name for row in texts for name in row]
    assert len(known) == len(set(known))
    assert texts[2][:2] == ["great white shark", "white shark"]
    assert texts[638] == ["maillot"] and texts[639] == ["tank suit"]


def test_other_classes_are_not_those_of_imagenet():
    texts = [text.split(",") for text in imagenet.texts()]
    assert imagenet.fit(texts)
    assert not imagenet.fit(texts[:999])
    assert not imagenet.fit([*texts[:999], ["unicorn"]])
