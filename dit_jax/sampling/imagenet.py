"""The names of ImageNet's 1,000 classes (ILSVRC 2012), by which official checkpoints are labelled.

imagenet.txt has a line for each class: its name, then its synonyms in WordNet. Two names that
WordNet gives to two classes each are told apart: crane and crane bird, maillot and tank suit.
"""

import functools
import hashlib
from pathlib import Path

# Of the ids of the classes in WordNet, n01440764 ..., which ImageNet's folders have as names.
IDS_SHA256 = "791ce0333040dd249d13133f90d28ef0263ffc01e5de0afd85b3e32048d7d456"


@functools.cache
def rows():
    """The names of each class, a tuple of tuples."""
    text = Path(__file__).with_suffix(".txt").read_text(encoding="utf-8")
    return tuple(tuple(line.split(", ")) for line in text.splitlines())


@functools.cache
def names():
    """The name of label 0, 1, ..., each different, as a tuple."""
    return tuple(row[0] for row in rows())


@functools.cache
def synonyms():
    """{another name: the labels that have it}; some names belong to two classes."""
    found = {}
    for label, row in enumerate(rows()):
        for name in row[1:]:
            found.setdefault(name, []).append(label)
    return found


def named(class_names):
    """names() if these are the ids of ImageNet's classes; else what is given, as a tuple."""
    text = " ".join(class_names).encode(errors="surrogatepass")
    digest = hashlib.sha256(text).hexdigest()
    return names() if digest == IDS_SHA256 else tuple(class_names)


def fit(given):
    """Whether rows of names, one for each label, share a name with each of ImageNet's classes."""
    return len(given) == len(rows()) and all(
        set(known) & {name.strip() for name in row}
        for known, row in zip(rows(), given, strict=True)
    )


@functools.cache
def texts():
    """[the name of a label, then its synonyms that no other label has, with commas between]."""
    found = synonyms()
    return [
        ", ".join((row[0], *(x for x in row[1:] if found[x] == [label] and x not in names())))
        for label, row in enumerate(rows())
    ]
