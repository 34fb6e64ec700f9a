"""Features of any number of images as one NumPy archive, with the memory of one batch."""

import contextlib
import os
import shutil
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import IO

import numpy as np

from densenet_jax.errors import UserError

_NAMES = "image"
_CHUNK = 4096  # names turned into an array at a time


class FeatureArchive:
    """Rows are appended to raw files beside the archive, which `finish` puts together.

    The archive holds "image", the paths, and for each kind of features a float32 array whose rows belong to them.
    """

    def __init__(self, path: str, shapes: Mapping[str, tuple[int, ...]], rows: int) -> None:
        """Opens the raw files with what earlier runs wrote.

        Args:
            path: of the .npz file.
            shapes: of one row, by the array's name.
            rows: how many rows earlier runs have to their predictions; what is there beyond them is dropped.

        Raises:
            UserError: rows are missing, or nothing can be written there.
        """
        self.path, self._shapes = path, dict(shapes)
        self._folder = f"{path}.partial"
        self._files: dict[str, IO[bytes]] = {}
        with self._explained():
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
        """Appends float32[n, *shape] to each.

        Raises:
            UserError: they can't be written.
        """
        with self._explained():
            for name, file in self._files.items():
                file.write(np.ascontiguousarray(arrays[name], np.float32).tobytes())
                file.flush()

    def finish(self, names: Callable[[], Iterable[str]], rows: int) -> None:
        """Writes the archive in one step and removes the raw files.

        Args:
            names: gives the `rows` names whenever it is called, in the order of the rows.
            rows: how many there are.

        Raises:
            UserError: it can't be written.
        """
        self.close()
        temporary = f"{self.path}.{os.getpid()}.tmp"
        with self._explained():
            width = max((len(name) for name in names()), default=1)
            with zipfile.ZipFile(temporary, "w") as archive:
                with _member(archive, _NAMES, f"<U{max(width, 1)}", (rows,)) as member:
                    for part in _chunks(names()):
                        member.write(np.array(part, f"<U{max(width, 1)}").tobytes())
                for name, shape in self._shapes.items():
                    with (
                        open(os.path.join(self._folder, name), "rb") as raw,
                        _member(archive, name, "<f4", (rows, *shape)) as member,
                    ):
                        shutil.copyfileobj(raw, member, 2**20)
            os.replace(temporary, self.path)
            shutil.rmtree(self._folder)

    def close(self) -> None:
        """Closes the raw files; they stay for the next run."""
        for file in self._files.values():
            file.close()

    def _unpack(self) -> None:
        """The raw files of an archive that is to grow."""
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

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"{self.path} can't be written ({error.strerror}); choose another --output.") from error


@contextlib.contextmanager
def _member(archive: zipfile.ZipFile, name: str, dtype: str, shape: tuple[int, ...]) -> Iterator[IO[bytes]]:
    with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
        np.lib.format.write_array_header_2_0(member, {"descr": dtype, "fortran_order": False, "shape": shape})
        yield member


def _chunks(names: Iterable[str]) -> Iterator[list[str]]:
    part: list[str] = []
    for name in names:
        part.append(name)
        if len(part) == _CHUNK:
            yield part
            part = []
    if part:
        yield part
