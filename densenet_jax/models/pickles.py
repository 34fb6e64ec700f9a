"""Reads the tensors of PyTorch and Paddle files without executing anything in them; neither program is needed.

A pickle names the classes and functions that rebuild its objects. Names are looked up in one table alone:
tensors become `Tensor`, NumPy arrays `Array`, and all else a `Stranger`, which ignores its arguments.
"""

from __future__ import annotations

import functools
import io
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from densenet_jax.errors import UserError, first_line
from densenet_jax.models.pickle_objects import KNOWN, Storage, Stranger, check_keys

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of a file that torch before 1.6 wrote
# Settings and progress that trainers save beside the weights; skipped silently.
_PASSED_OVER = (
    *("argparse", "datetime", "pathlib", "numpy", "torch.optim", "omegaconf", "yacs.config", "easydict"),
    *("pytorch_lightning", "lightning", "lightning_fabric", "lightning_utilities"),
)
_PASSED_OVER_NAMES = ("torch.device", "torch.serialization._get_layout", "torch.nn.parameter.Parameter")


class _Unpickler(pickle._Unpickler):  # the one in C allocates a table as long as a file's largest memo index
    def __init__(self, file: io.BufferedIOBase, storages: dict[str, Storage]):
        super().__init__(file, encoding="latin1")
        self.strangers: list[str] = []
        self._storages = storages

    def find_class(self, module: str, name: str) -> Any:
        """Looks the name up in the table, else makes a new kind of `Stranger`; imports nothing."""
        full = f"{module}.{name}".encode("unicode_escape").decode()[:100]
        if full in KNOWN:
            return KNOWN[full]
        passed_over = full in _PASSED_OVER_NAMES or any(f"{module}.".startswith(f"{part}.") for part in _PASSED_OVER)
        if not passed_over and full not in self.strangers:
            self.strangers.append(full)
        return type("Stranger", (Stranger,), {"origin": full})

    def persistent_load(self, pid: Any) -> Any:
        """Returns the storage that a tensor refers to."""
        if pid[0] == "module":  # a class beside its source code, in old files
            return pid[1]
        _, dtype, key = pid[:3]
        if not isinstance(dtype, str):
            raise ValueError(f"it holds {dtype.origin}")
        if not isinstance(key, str | int):  # nested tuples can have endless names
            raise ValueError("a storage has no name")
        return self._storages.setdefault(str(key), Storage(dtype))


def _check_before(load: Callable[[Any], None], keys: slice) -> Callable[[Any], None]:
    def checked(unpickler: Any) -> None:
        check_keys(unpickler.stack[keys])
        load(unpickler)

    return checked


_KEYS = {
    pickle.SETITEM: slice(-2, -1),
    **dict.fromkeys((pickle.SETITEMS, pickle.DICT), slice(0, None, 2)),
    **dict.fromkeys((pickle.ADDITEMS, pickle.FROZENSET), slice(None)),
}
_Unpickler.dispatch = dict(pickle._Unpickler.dispatch)
for _opcode, _keys in _KEYS.items():
    _Unpickler.dispatch[_opcode[0]] = _check_before(_Unpickler.dispatch[_opcode[0]], _keys)


def read_pickle(path: Path) -> tuple[Any, list[str]]:
    """Reads the object in a .pth, .ckpt, .bin or .pdparams file, whatever its name.

    Returns it with the names of the classes in it that are not in the table.

    Raises:
        UserError: the file is damaged, or of a kind that is not read.
    """
    try:
        with open(path, "rb") as file:
            if file.read(4) == b"PK\x03\x04":
                return _read_zip(path)
            file.seek(0)
            return _read_stream(file)
    except UserError:
        raise
    except Exception as error:  # a damaged or hostile pickle can raise anything
        raise UserError(
            f"{path} is not a readable PyTorch or Paddle file ({first_line(error)}): it is damaged or was not written "
            "by torch.save or paddle.save; nothing in it was executed"
        ) from error


def _read_zip(path: Path) -> tuple[Any, list[str]]:
    archive = zipfile.ZipFile(path)
    names = archive.namelist()
    root = next((name.removesuffix("data.pkl") for name in names if name.endswith("/data.pkl")), None)
    if root is None:
        raise UserError(f"{path} is a zip archive without weights: expected a file that torch.save wrote")
    if f"{root}constants.pkl" in names:
        raise UserError(f"{path} is a TorchScript program: save the weights with torch.save(module.state_dict(), FILE)")
    big = f"{root}byteorder" in names and _read_member(archive, f"{root}byteorder") == b"big"
    if big:
        raise UserError(f"{path} was written on a big-endian machine, which is not read: save it again on another")
    storages: dict[str, Storage] = {}
    unpickler = _Unpickler(io.BytesIO(_read_member(archive, f"{root}data.pkl")), storages)
    content = unpickler.load()
    for key, storage in storages.items():
        storage.content = functools.partial(_read_member, archive, f"{root}data/{key}")
    return content, unpickler.strangers


def _read_member(archive: zipfile.ZipFile, name: str) -> bytes:
    if archive.getinfo(name).compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{name} is compressed, which torch.save never does")
    return archive.read(name)


def _read_stream(file: io.BufferedIOBase) -> tuple[Any, list[str]]:
    storages: dict[str, Storage] = {}
    unpickler = _Unpickler(file, storages)
    content = unpickler.load()
    if content != _LEGACY_MAGIC:
        return content, unpickler.strangers
    for _ in range(2):  # version of the format, sizes of the machine's numbers
        _Unpickler(file, storages).load()
    unpickler = _Unpickler(file, storages)
    content = unpickler.load()
    for key in _Unpickler(file, storages).load():
        check_keys([key])
        storage = storages[str(key)]
        (count,) = struct.unpack("<q", file.read(8))
        size = count * storage.dtype.itemsize
        storage.content = file.read(max(size, 0))
        if len(storage.content) != size:
            raise ValueError("the file ends early")
    return content, unpickler.strangers
