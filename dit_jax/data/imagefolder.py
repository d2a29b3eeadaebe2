"""The labelled images of a tree of folders, or of ImageNet's tar of tars, listed but not read.

A tree has one folder for each class; the tar, as ILSVRC2012_img_train.tar, one tar for each class.
"""

import tarfile
from pathlib import Path
from typing import NamedTuple

from dit_jax.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


class Example(NamedTuple):
    """One image: `size` bytes of a file from `offset` on."""

    name: str  # class/file
    label: int
    path: str
    offset: int
    size: int

    def read(self):
        """The bytes of the image's file."""
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


class Listing(NamedTuple):
    classes: list[str]  # sorted: label i is the i-th
    examples: list[Example]  # sorted by name
    ignored: list[str]  # names of files that are no images


def scan(path):
    """The Listing of a folder or of a tar; UserError where a class has no image."""
    path = Path(path)
    if path.is_dir():
        files = sorted(_walk(path))
    elif path.is_file():
        files = sorted(_walk_tars(path))
    else:
        raise UserError(f"source must be a folder or a tar that exists, got {path}")
    images = [file for file in files if is_image(file)]
    for name, *_ in images:
        if not name.isprintable():  # as one that is no UTF-8, or with a line break
            raise UserError(f"name of a file must be printable UTF-8, got {ascii(name)}")
    classes = sorted({name.split("/")[0] for name, *_ in images})
    if not classes:
        kind = "folder" if path.is_dir() else "tar"
        raise UserError(f"source must have a {kind} of images for each class, got none in {path}")
    empty = _all_classes(path, files) - set(classes)
    if empty:
        raise UserError(f"every class must have images, got none of {min(empty)} in {path}")
    labels = {name: label for label, name in enumerate(classes)}
    examples = [Example(file[0], labels[file[0].split("/")[0]], *file[1:]) for file in images]
    ignored = sorted({name for name, *_ in files} - {name for name, *_ in images})
    return Listing(classes, examples, ignored)


def is_image(file):
    """Whether one of `_walk` lies in a class, is there and has the name of an image."""
    name, *_, size = file
    return size >= 0 and "/" in name and Path(name).suffix.lower() in SUFFIXES


def _walk(folder):
    """(class/file, path, 0, size) of every file in a folder and below; size -1: a broken link.

    The folders of classes, and no deeper ones, may be symbolic links.
    """
    for place in folder.iterdir():
        for path in place.rglob("*") if place.is_dir() else [place]:
            if not path.is_dir():
                size = path.stat().st_size if path.exists() else -1
                yield str(path.relative_to(folder)), str(path), 0, size


def _walk_tars(path):
    """(class/file, path, offset, size) of every file in the tars of a tar."""
    try:
        with tarfile.open(path, "r:") as outer:
            for tar in outer:
                if not tar.isfile() or not tar.name.endswith(".tar"):
                    continue
                name = Path(tar.name).stem
                with tarfile.open(fileobj=outer.extractfile(tar), mode="r:") as inner:
                    for file in inner:
                        if file.isfile():
                            offset = tar.offset_data + file.offset_data
                            yield f"{name}/{Path(file.name).name}", str(path), offset, file.size
    except tarfile.TarError as error:
        hint = "it is compressed" if _is_compressed(path) else error
        raise UserError(f"source must be a whole tar of tars, got {path}: {hint}") from error


def _is_compressed(path):
    with path.open("rb") as file:
        return file.read(6).startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00"))


def _all_classes(path, files):
    """The classes that a folder names, those without a file too."""
    if path.is_dir():
        return {place.name for place in path.iterdir() if place.is_dir()}
    return {name.split("/")[0] for name, *_ in files if "/" in name}
