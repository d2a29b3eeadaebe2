"""Reads labels as a user writes them: numbers, ranges, names of classes, or all.

`3,1,4`, `0-9` (both ends included), `all`, `cat,"a name, with a comma"`. A whole number is always a
label, and the ends of a range are labels. What stands in double quotes is always a name.
"""

import difflib
import re

from absl import logging

from dit_jax.errors import UserError

RANGE = re.compile(r"(\d+)-(\d+)")
QUOTED = re.compile(r'"((?:[^"]|"")*)"')  # "" is a quote
NUM_NEAR = 3  # names that an error offers


def parse(text, class_names, num_classes):
    """The labels of a text with commas, a list of numbers; UserError if a part is no label.

    class_names: of label 0, 1, ...; () if the labels have no names.
    """
    items = _split(text)
    _warn_of_numbers(items, class_names)
    return [label for item in items for label in _read(item, class_names, num_classes)]


def read_file(path, class_names, num_classes):
    """The labels of a file with one number, range or name a line, where names may hold commas.

    Empty lines are left out. UserError that names the line if it is no label.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"labels_file must be text in UTF-8, got {path}: {error}") from error
    items = {number: line.strip() for number, line in enumerate(lines, 1) if line.strip()}
    _warn_of_numbers(items.values(), class_names)
    labels = []
    for number, item in items.items():
        try:
            labels += _read(item, class_names, num_classes)
        except UserError as error:
            raise UserError(f"line {number} of {path}: {error}") from error
    if not labels:
        raise UserError(f"labels_file must have at least one label, got {path} without any")
    return labels


def _split(text):
    """The parts of a text between the commas that are not in quotes."""
    items, is_open = [], False
    for part in text.split(","):
        if is_open:
            items[-1] += f",{part}"
        else:
            items.append(part)
        item = items[-1].strip()
        is_open = item.startswith('"') and not QUOTED.fullmatch(item)
    return [item.strip() for item in items]


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
    if bounds := RANGE.fullmatch(item):
        first, last = map(int, bounds.groups())
        if first > last:
            raise UserError(f"labels must have ranges that go up, as 0-9, got {item}")
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
            "checkpoint have no names"
        )
    folded = {each.casefold(): each for each in class_names}
    near = difflib.get_close_matches(name.casefold(), folded, NUM_NEAR)
    some = [folded[each] for each in near] or class_names[:NUM_NEAR]
    raise UserError(
        f"labels must be numbers, ranges or names of classes, got {name!r}; "
        f"{'did you mean' if near else 'names are'} {', '.join(some)}{'?' if near else ', ...'}"
    )
