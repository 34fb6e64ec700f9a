"""Writes features of any number of images to a NumPy archive, with the memory of one batch."""

import contextlib
import itertools
import os
import shutil
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import IO

import numpy as np

from densenet_jax.errors import UserError, report_write_errors
from densenet_jax.system.disk import replace_file

_NAMES = "image"
_REMEDY = "choose another --output"
_CHUNK = 4096  # names converted to an array at a time


class FeatureArchive:
    """Appends rows to raw files beside the archive and combines them in `finish`.

    The archive holds "image", the paths, and a float32 array with one row an image for each kind of features.
    """

    def __init__(self, path: str, shapes: Mapping[str, tuple[int, ...]], rows: int) -> None:
        """Opens the raw files of the .npz file `path`, keeping the first `rows` rows of earlier runs.

        `shapes` are those of a row of each array.

        Raises:
            UserError: rows are missing, or the files can't be written.
        """
        self.path, self._shapes = path, dict(shapes)
        self._folder = f"{path}.partial"
        self._files: dict[str, IO[bytes]] = {}
        with self._report_errors():
            os.makedirs(self._folder, exist_ok=True)
            if rows and not os.listdir(self._folder):
                self._unpack()
            for name, shape in self._shapes.items():
                file = self._files[name] = open(os.path.join(self._folder, name), "ab")  # noqa: SIM115
                size = rows * 4 * int(np.prod(shape))
                if file.tell() < size:
                    self.close()
                    raise UserError(f"{path} lacks features of earlier predictions; remove those to start over.")
                file.truncate(size)

    def write(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Appends float32 [n, *shape] to each array.

        Raises:
            UserError: a file can't be written.
        """
        with self._report_errors():
            for name, file in self._files.items():
                file.write(np.ascontiguousarray(arrays[name], np.float32).tobytes())
                file.flush()

    def finish(self, names: Callable[[], Iterable[str]], rows: int) -> None:
        """Writes the archive atomically and removes the raw files.

        `names` returns the image of each row, in order; it is called twice.

        Raises:
            UserError: the archive can't be written.
        """
        self.close()
        with self._report_errors():
            width = max((len(name) for name in names()), default=1) or 1
            with replace_file(self.path) as file, zipfile.ZipFile(file, "w") as archive:
                with _member(archive, _NAMES, f"<U{width}", (rows,)) as member:
                    remaining = iter(names())
                    while part := list(itertools.islice(remaining, _CHUNK)):
                        member.write(np.array(part, f"<U{width}").tobytes())
                for name, shape in self._shapes.items():
                    with (
                        open(os.path.join(self._folder, name), "rb") as raw,
                        _member(archive, name, "<f4", (rows, *shape)) as member,
                    ):
                        shutil.copyfileobj(raw, member, 2**20)
            shutil.rmtree(self._folder)

    def close(self) -> None:
        """Closes the raw files and keeps them for the next run."""
        for file in self._files.values():
            file.close()

    def _unpack(self) -> None:
        """Extracts the raw files of an archive so that rows can be appended."""
        try:
            with zipfile.ZipFile(self.path) as archive:
                for name in self._shapes:
                    with archive.open(f"{name}.npy") as member, open(os.path.join(self._folder, name), "wb") as raw:
                        np.lib.format.read_magic(member)
                        np.lib.format.read_array_header_2_0(member)
                        shutil.copyfileobj(member, raw, 2**20)
        except (KeyError, ValueError, FileNotFoundError, zipfile.BadZipFile):
            shutil.rmtree(self._folder)
            os.makedirs(self._folder)

    def _report_errors(self) -> contextlib.AbstractContextManager[None]:
        return report_write_errors(self.path, _REMEDY)


@contextlib.contextmanager
def _member(archive: zipfile.ZipFile, name: str, dtype: str, shape: tuple[int, ...]) -> Iterator[IO[bytes]]:
    with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
        np.lib.format.write_array_header_2_0(member, {"descr": dtype, "fortran_order": False, "shape": shape})
        yield member
