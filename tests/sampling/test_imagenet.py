import pytest

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
