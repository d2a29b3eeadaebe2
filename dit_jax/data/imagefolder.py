"""Lists the labelled images of a folder tree, or of ImageNet's tar of tars, without reading them.

A folder tree has one folder for each class. A tar of tars, like ILSVRC2012_img_train.tar, has one
tar for each class.
"""

import tarfile
import unicodedata
from pathlib import Path
from typing import NamedTuple

from dit_jax.errors import UserError
from dit_jax.machine import disk

SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


class Example(NamedTuple):
    """One image: `size` bytes at `offset` of the file at `path`."""

    name: str  # class/file
    label: int
    path: str
    offset: int
    size: int

    def read(self):
        """The bytes of the image file."""
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


class Listing(NamedTuple):
    classes: list[str]  # sorted; the index is the label
    examples: list[Example]  # sorted by name
    ignored: list[str]  # names of the files that are not images


class File(NamedTuple):
    """A file in a folder or a tar, before it has a label."""

    name: str  # relative to the source: class/file
    path: str
    offset: int
    size: int  # -1 for a broken symbolic link


def scan(path):
    """The Listing of a folder or of a tar; UserError if a class has no images.

    Hidden names and those of operating systems (`disk.is_clutter`) are ignored.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(_walk(path))
    elif path.is_file():
        files = sorted(_walk_tars(path))
    else:
        raise UserError(f"source must be a folder or a tar that exists, got {path}")
    images = [file for file in files if is_image(file)]
    _check_names(path, images)
    classes = sorted({file.name.split("/")[0] for file in images})
    if not classes:
        kind = "folder" if path.is_dir() else "tar"
        raise UserError(f"source must have a {kind} of images for each class, got none in {path}")
    empty = _all_classes(path, files) - set(classes)
    if empty:
        raise UserError(f"every class must have images, got none for {min(empty)} in {path}")
    labels = {name: label for label, name in enumerate(classes)}
    examples = [
        Example(file.name, labels[file.name.split("/")[0]], file.path, file.offset, file.size)
        for file in images
    ]
    ignored = sorted({file.name for file in files} - {file.name for file in images})
    return Listing(classes, examples, ignored)


def is_image(file):
    """Whether a File exists, is in a class and has the suffix of an image."""
    suffix = Path(file.name).suffix.lower()
    in_class = "/" in file.name and not any(map(disk.is_clutter, file.name.split("/")))
    return file.size >= 0 and in_class and suffix in SUFFIXES


def _check_names(path, images):
    """UserError if a name cannot be written to the data set, or if the classes are splits."""
    for file in images:
        if any(unicodedata.category(x) in ("Cc", "Cs") for x in file.name):  # Cs: not UTF-8
            rule = "a file name must be UTF-8 without control characters"
            raise UserError(f"{rule}, got {ascii(file.name)}")
        name = file.name.split("/")[0]
        if name != name.strip():  # tensorflow-datasets strips it
            raise UserError(f"a class name must not begin or end with a space, got {name!r}")
    names = {file.name.split("/")[0] for file in images}
    if names and names <= SPLITS and all(file.name.count("/") > 1 for file in images):
        raise UserError(
            f"source must have a folder for each class, got the splits {', '.join(sorted(names))}: "
            f"prepare {path / min(names, key=lambda x: (not x.startswith('train'), x))}"
        )


def _walk(folder):
    """Yields every File below a folder.

    The class folders may be symbolic links; links to deeper folders are not followed.
    """
    for child in folder.iterdir():
        for path in child.rglob("*") if child.is_dir() else [child]:
            if not path.is_dir():
                size = path.stat().st_size if path.exists() else -1
                yield File(str(path.relative_to(folder)), str(path), 0, size)


def _walk_tars(path):
    """Yields every File in the tars of a tar."""
    try:
        with tarfile.open(path, "r:") as outer:
            for tar in outer:
                if not tar.isfile() or not tar.name.endswith(".tar"):
                    continue
                class_name = Path(tar.name).stem
                with tarfile.open(fileobj=outer.extractfile(tar), mode="r:") as inner:
                    for file in inner:
                        if file.isfile():
                            name = f"{class_name}/{Path(file.name).name}"
                            offset = tar.offset_data + file.offset_data
                            yield File(name, str(path), offset, file.size)
    except tarfile.TarError as error:
        hint = "it is compressed" if _is_compressed(path) else error
        raise UserError(f"source must be a complete tar of tars, got {path}: {hint}") from error


def _is_compressed(path):
    with path.open("rb") as file:
        return file.read(6).startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00"))  # gzip, bzip2, xz


def _all_classes(path, files):
    """The names of all classes, including those without files in a folder tree."""
    if path.is_dir():
        folders = (child.name for child in path.iterdir() if child.is_dir())
        return {name for name in folders if not disk.is_clutter(name)}
    return {file.name.split("/")[0] for file in files if "/" in file.name}
