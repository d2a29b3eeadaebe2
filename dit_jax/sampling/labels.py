"""Reads labels as a user writes them: numbers, ranges, names of classes, or all.

`3,1,4`, `0-9` (both ends included), `all`, `cat,"a name, with a comma"`. A whole number is always a
label, and the ends of a range are labels. What stands in double quotes is always a name.
"""

import contextlib
import difflib
import re

from absl import logging

from dit_jax.errors import UserError
from dit_jax.sampling import imagenet

RANGE = re.compile(r"(\d+)-(\d+)")
QUOTED = re.compile(r'"((?:[^"]|"")*)"')  # "" is a quote
NUM_NEAR = 3  # names that an error offers


def parse(text, class_names, num_classes, *, warns=True):
    """The labels of a text with commas, a list of numbers; UserError if a part is no label.

    class_names: of label 0, 1, ...; () if the labels have no names. warns: logs what may be meant
    otherwise.
    """
    items = split(text)
    if warns:
        _warn_of_numbers(items, class_names)
    return [label for item in items for label in _read(item, class_names, num_classes)]


def read_file(path, class_names, num_classes, *, warns=True):
    """The labels of a file, of `read_lines`; UserError that names the line if it is no label."""
    items = read_lines(path)
    if warns:
        _warn_of_numbers(items.values(), class_names)
    labels = []
    for number, item in items.items():
        with _of_line(number, path):
            labels += _read(item, class_names, num_classes)
    return labels


def read_lines(path):
    """{line: its number, range or name} of a file, where names may hold commas.

    Empty lines are left out. UserError if nothing is left, or for a range that goes down.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"labels_file must be text in UTF-8, got {path}: {error}") from error
    items = {number: line.strip() for number, line in enumerate(lines, 1) if line.strip()}
    for number, item in items.items():
        with _of_line(number, path):
            _bounds(item)
    if not items:
        raise UserError(f"labels_file must have at least one label, got {path} without any")
    return items


@contextlib.contextmanager
def _of_line(number, path):
    try:
        yield
    except UserError as error:
        raise UserError(f"line {number} of {path}: {error}") from error


def split(text):
    """The parts of a text between the commas that are not in quotes.

    UserError for a part that is empty, a quote that is not closed, or a range that goes down.
    """
    items, is_open = [], False
    for part in text.split(","):
        if is_open:
            items[-1] += f",{part}"
        else:
            items.append(part)
        item = items[-1].strip()
        is_open = item.startswith('"') and not QUOTED.fullmatch(item)
    items = [item.strip() for item in items]
    if items == [""]:
        raise UserError("labels must have at least one label, got none")
    if "" in items:
        raise UserError(f"labels must have a label on both sides of a comma, got {text!r}")
    if is_open:
        raise UserError(f"labels must close every quote, got {items[-1]!r}")
    for item in items:
        _bounds(item)
    return items


def _bounds(item):
    """(first, last) of a range, None if it is none; UserError if it goes down."""
    if not (found := RANGE.fullmatch(item)):
        return None
    first, last = map(int, found.groups())
    if first > last:
        raise UserError(f"labels must have ranges that go up, as 0-9, got {item}")
    return first, last


def _warn_of_numbers(items, class_names):
    """Warns of the first number that is the label of one class and the name of another."""
    for label, name in enumerate(class_names):
        if name.isdecimal() and int(name) != label and name in items:
            logging.warning(
                '%s in labels is the label of a class, not its name: write "%s" in quotes for '
                "the class of that name, which has label %d",
                *(name, name, label),
            )
            return


def _read(item, class_names, num_classes):
    """The labels that one part stands for."""
    if quoted := QUOTED.fullmatch(item):
        return [_find(quoted[1].replace('""', '"'), class_names)]
    if item == "all":
        return list(range(num_classes))
    if bounds := _bounds(item):
        first, last = bounds
        return list(range(first, _check(last, item, class_names, num_classes) + 1))
    if re.fullmatch(r"-?\d+", item):
        return [_check(int(item), item, class_names, num_classes)]
    return [_find(item, class_names)]


def _check(label, item, class_names, num_classes):
    if 0 <= label < num_classes:
        return label
    hint = f'; write "{item}" in quotes for the class of that name' if item in class_names else ""
    raise UserError(f"labels must be in 0 .. {num_classes - 1}, got {item}{hint}")


def _find(name, class_names):
    """The label of a name; UserError with the nearest names."""
    if name in class_names:
        return class_names.index(name)
    if not class_names:
        raise UserError(
            f"labels must be whole numbers separated by commas, got {name!r}: the classes of this "
            "checkpoint have no names; dit-convert gives it some with --class_names"
        )
    synonyms = imagenet.synonyms() if tuple(class_names) == imagenet.names() else {}
    found = synonyms.get(name, [])
    if len(found) == 1:
        return found[0]
    if found:
        which = " and ".join(class_names[label] for label in found)
        raise UserError(f"labels must be names of one class each, got {name!r}: {which} have it")
    near = _nearest(name.casefold(), (*class_names, *synonyms))
    names = ", ".join(near or class_names[:NUM_NEAR])
    rest = ", ..." if len(class_names) > NUM_NEAR else ""
    raise UserError(
        f"labels must be numbers, ranges or names of classes, got {name!r}; "
        + (f"did you mean {names}?" if near else f"names are {names}{rest}")
    )


def _nearest(folded, names):
    """What may be meant by a folded name: names with that word, or like it, or that contain it."""
    if folded == "all":
        return ["all"]
    known = {}
    for each in names:
        known.setdefault(each.casefold(), each)  # the first of names that differ in their case
    near = [each for each in known if folded in each.split()]
    near = near or difflib.get_close_matches(folded, known, NUM_NEAR)
    near = near or [each for each in known if folded in each]
    return [known[each] for each in near[:NUM_NEAR]]
