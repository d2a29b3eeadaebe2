"""Images to judge that exist already: a folder of image files, or an .npz as ADM's evaluator reads.

Both are read a part at a time, in their order. Shapes: N images, H W height and width.
"""

import concurrent.futures
import functools
import hashlib
import zipfile
import zlib

import numpy as np
from PIL import Image

from dit_jax.data import imagefolder, images
from dit_jax.errors import UserError
from dit_jax.evals.request import FEWEST
from dit_jax.machine import disk


def open_images(path):
    """The Folder or Npz at a path; UserError if it is neither, or holds no images of one size."""
    path = disk.path(path)
    if path.is_dir():
        return Folder(path)
    if path.suffix == ".npz" and path.is_file():
        return Npz(path)
    raise UserError(f"samples must be a folder of images or an .npz that exists, got {path}")


def open_reference(path, shape):
    """The Npz of a reference's images, None if it has moments only.

    shape: of the samples, (H, W, C). UserError if the file is no reference, or one of images of
    another shape, or of fewer than FEWEST.
    """
    path = disk.path(path)
    if not path.is_file() or path.suffix != ".npz":
        raise UserError(f"reference must be an .npz of ADM's format that exists, got {path}")
    names = names_in(path)
    if "arr_0" not in names:
        if not {"mu", "sigma"} <= set(names):
            raise UserError(f"reference must have mu and sigma, or images as arr_0, got {path}")
        return None
    opened = Npz(path)
    if opened.shape != shape:
        sizes = ["{} x {}".format(*x) for x in (shape, opened.shape)]
        raise UserError(f"reference must have images of {sizes[0]}, got {sizes[1]} in {path}")
    if len(opened) < FEWEST:
        raise UserError(f"reference must have at least {FEWEST} images, got {len(opened)}: {path}")
    return opened


def names_in(path):
    """The names of the arrays in an .npz."""
    try:
        with path.open("rb") as opened, zipfile.ZipFile(opened) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist()]
    except (zipfile.BadZipFile, EOFError) as error:
        raise UserError(f"{path} must be a whole .npz, got: {error}") from error


class Folder:
    """The image files of a folder and of the folders in it, sorted by name."""

    def __init__(self, path):
        self.path = path
        self.files = sorted(
            file
            for file in path.rglob("*")
            if file.suffix.lower() in imagefolder.SUFFIXES
            and not any(map(disk.is_clutter, file.relative_to(path).parts))
            and file.is_file()
        )
        if not self.files:
            raise UserError(f"samples must be a folder with images, got none in {path}")
        self.size = self._decode(self.files[0]).size

    def __len__(self):
        return len(self.files)

    @property
    def shape(self):
        width, height = self.size
        return height, width, 3

    @functools.cached_property
    def sha256(self):
        """A digest of all names and contents."""
        digest = hashlib.sha256()
        for file in self.files:
            digest.update(f"{file.relative_to(self.path)} {disk.sha256(file)}\n".encode())
        return digest.hexdigest()

    def check_sizes(self):
        """UserError if a file's header has another size, or if it cannot be read; decodes none.

        A photograph that its EXIF turns on its side may be stored as W x H.
        """
        with concurrent.futures.ThreadPoolExecutor() as threads:
            for file, size in zip(self.files, threads.map(_size_of, self.files), strict=True):
                if size is None or sorted(size) != sorted(self.size):
                    self._read(file)

    def read(self, start, stop):
        """Images start .. stop - 1: uint8 (n, H, W, 3)."""
        with concurrent.futures.ThreadPoolExecutor() as threads:
            return np.stack(list(threads.map(self._read, self.files[start:stop])))

    def _read(self, file):
        image = self._decode(file)
        if image.size != self.size:
            first, other = ("{} x {}".format(*x) for x in (self.size, image.size))
            raise UserError(
                f"samples must have one size, got {first} in {self.files[0].name} and {other} in "
                f"{file.relative_to(self.path)}"
            )
        return np.asarray(image)

    def _decode(self, file):
        try:
            return images.decode(file.read_bytes())
        except UserError as error:
            raise UserError(f"{file}: {error}") from error


def _size_of(file):
    """(W, H) in the header of an image file, None if there is none."""
    try:
        with Image.open(file) as image:
            return image.size
    except Exception:  # Pillow raises many types for a corrupt file
        return None


class Npz:
    """arr_0 of an .npz, uint8 (N, H, W, 3), which may be larger than the memory."""

    def __init__(self, path):
        self.path, self._archive, self._stream, self._next = path, None, None, 0
        self.count, *shape = self._open()
        self.shape = tuple(shape)

    def __len__(self):
        return self.count

    @functools.cached_property
    def sha256(self):
        return disk.sha256(self.path)

    def _open(self):
        """Goes to the first image; returns the shape of arr_0."""
        names = names_in(self.path)
        if "arr_0" not in names:
            found = ", ".join(names) or "nothing"
            raise UserError(f"{self.path} must hold images as arr_0, got {found}")
        try:
            self.close()
            archive = self._archive = zipfile.ZipFile(self.path)
            self._stream, self._next = archive.open("arr_0.npy"), 0
            version = np.lib.format.read_magic(self._stream)
            read = np.lib.format.read_array_header_1_0
            read = read if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran_order, dtype = read(self._stream)
        except (zipfile.BadZipFile, ValueError, EOFError) as error:
            raise UserError(f"{self.path} must be a whole .npz, got: {error}") from error
        if dtype != np.uint8 or len(shape) != 4 or shape[-1] != 3 or fortran_order:
            raise UserError(
                f"arr_0 of {self.path} must be uint8 (N, H, W, 3), got {dtype} {shape}"
                + (" in Fortran order" if fortran_order else "")
            )
        if 0 in shape:
            raise UserError(f"arr_0 of {self.path} must have at least 1 image, got {shape}")
        return shape

    def check_sizes(self):
        """Nothing: an array has one size."""

    def close(self):
        for opened in (self._stream, self._archive):
            if opened:
                opened.close()

    __del__ = close

    def read(self, start, stop):
        """Images start .. stop - 1: uint8 (n, H, W, 3)."""
        size = int(np.prod(self.shape))
        if start < self._next:
            self._open()
        try:
            while self._next < start:
                self._next += 1
                self._stream.read(size)
            data = self._stream.read((stop - start) * size)
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise UserError(f"{self.path} must be a whole .npz, got: {error}") from error
        self._next = stop
        if len(data) != (stop - start) * size:
            raise UserError(f"{self.path} must be a whole .npz, got a truncated arr_0")
        return np.frombuffer(data, np.uint8).reshape(stop - start, *self.shape)
