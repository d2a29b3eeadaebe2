"""The names of ImageNet's 1,000 classes (ILSVRC 2012), by which official checkpoints are labelled.

imagenet.txt has a line for each class: its name, then its synonyms in WordNet. Two names that
WordNet gives to two classes each are told apart: crane and crane bird, maillot and tank suit.
"""

import functools
from pathlib import Path


@functools.cache
def _table():
    """The names of each class, a tuple of tuples."""
    text = Path(__file__).with_suffix(".txt").read_text(encoding="utf-8")
    return tuple(tuple(line.split(", ")) for line in text.splitlines())


@functools.cache
def names():
    """The name of label 0, 1, ..., each different, as a tuple."""
    return tuple(row[0] for row in _table())


@functools.cache
def synonyms():
    """{another name: the labels that have it}; some names belong to two classes."""
    found = {}
    for label, row in enumerate(_table()):
        for name in row[1:]:
            found.setdefault(name, []).append(label)
    return found
