import pytest

from dit_jax.errors import UserError
from dit_jax.sampling import labels

NAMES = ("red circle", "blue square", "round, red", "all", "0-1", 'a "b"')


def parse(text, names=NAMES):
    return labels.parse(text, names, len(names) or 10)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("3,1, 4", [3, 1, 4]),
        ("1-3", [1, 2, 3]),
        ("5,0-0", [5, 0]),
        ("all", [0, 1, 2, 3, 4, 5]),
        ("blue square,red circle,blue square", [1, 0, 1]),
        ('"round, red" ,red circle', [2, 0]),
        ('0,"round, red"', [0, 2]),
        ('"all"', [3]),
        ('"0-1",0-1', [4, 0, 1]),
        ('a "b"', [5]),
        ('"a ""b"""', [5]),
    ],
)
def test_numbers_ranges_names_and_all(text, expected):
    assert parse(text) == expected


@pytest.mark.parametrize(
    "text, message",
    [
        ("6", "^labels must be in 0 .. 5, got 6$"),
        ("-1", "^labels must be in 0 .. 5, got -1$"),
        ("0-6", "^labels must be in 0 .. 5, got 0-6$"),
        ("3-1", "^labels must have ranges that go up, as 0-9, got 3-1$"),
        ("Red Circle", "names of classes, got 'Red Circle'; did you mean red circle"),
        ("blue sqare", r"got 'blue sqare'; did you mean blue square\?$"),
        ("ALL", r"got 'ALL'; did you mean all\?$"),
        ("circle", r"got 'circle'; did you mean red circle\?$"),
        ("xyz", "got 'xyz'; names are red circle, blue square, round, red, ...$"),
        ("red", r"got 'red'; did you mean red circle, round, red\?$"),
        (" ", "^labels must have at least one label, got none$"),
        ("0,,1", "^labels must have a label on both sides of a comma, got '0,,1'$"),
        ('0,"round, red', "^labels must close every quote, got '\"round, red'$"),
        ('"6"', "got '6'; "),
    ],
)
def test_what_is_no_label_is_one_line_with_the_nearest_names(text, message):
    with pytest.raises(UserError, match=message) as caught:
        parse(text)
    assert "\n" not in str(caught.value)


def test_without_names_only_numbers_are_labels():
    assert parse("all", ()) == list(range(10))
    assert parse("7,0-1", ()) == [7, 0, 1]
    with pytest.raises(
        UserError, match="whole numbers separated by commas, got 'cat': the classes"
    ):
        parse("cat", ())


def test_a_number_is_a_label_even_if_it_is_the_name_of_another_class(caplog):
    names = ("0", "1", "10", "2")
    assert parse("0,1", names) == [0, 1] and not caplog.records
    assert parse("2", names) == [2]
    assert '2 in labels is the label of a class, not its name: write "2"' in caplog.text
    assert "which has label 3" in caplog.text
    assert parse('"2","10"', names) == [3, 2]
    with pytest.raises(UserError, match='in 0 .. 3, got 10; write "10" in quotes for the class'):
        parse("10", names)


def test_a_file_has_a_label_a_line(tmp_path):
    path = tmp_path / "labels.txt"
    path.write_text('red circle\nround, red\n\n 5 \n0-2\n"all"\n')
    assert labels.read_file(path, NAMES, 6) == [0, 2, 5, 0, 1, 2, 3]
    path.write_text("".join(f"{i % 6}\n" for i in range(50_000)))
    assert len(labels.read_file(path, NAMES, 6)) == 50_000


@pytest.mark.parametrize(
    "content, message",
    [
        (
            b"0\n\nred circl\n",
            r"^line 3 of .*labels.txt: labels must .* did you mean red circle\?$",
        ),
        (b"0\n9\n", "^line 2 of .*labels.txt: labels must be in 0 .. 5, got 9$"),
        (b" \n", "^labels_file must have at least one label, got .*labels.txt without any$"),
        (b"\xff\xfe", "^labels_file must be text in UTF-8, got .*labels.txt: "),
    ],
)
def test_a_wrong_line_of_a_file_is_named(tmp_path, content, message):
    path = tmp_path / "labels.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        labels.read_file(path, NAMES, 6)
