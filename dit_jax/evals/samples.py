"""Images to judge that exist already: a folder of image files, or an .npz as ADM's evaluator reads.

Both are read a part at a time, in their order. Shapes: N images, H W height and width.
"""

import concurrent.futures
import functools
import hashlib
import zipfile
import zlib

import numpy as np

from dit_jax.data import imagefolder, images
from dit_jax.errors import UserError
from dit_jax.machine import disk


def open_images(path):
    """The Folder or Npz at a path; UserError if it is neither, or holds no images of one size."""
    path = disk.path(path)
    if path.is_dir():
        return Folder(path)
    if path.suffix == ".npz" and path.is_file():
        return Npz(path)
    raise UserError(f"samples must be a folder of images or an .npz that exists, got {path}")


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
        try:
            self.close()
            archive = self._archive = zipfile.ZipFile(self.path)
            if "arr_0.npy" not in archive.namelist():
                names = ", ".join(name.removesuffix(".npy") for name in archive.namelist())
                raise UserError(f"{self.path} must hold images as arr_0, got {names or 'nothing'}")
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
        if not shape[0]:
            raise UserError(f"arr_0 of {self.path} must have at least 1 image, got none")
        return shape

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
