"""Reads the tensors of PyTorch and Paddle files without executing anything in them; neither program is needed.

A pickle names the classes and functions that rebuild its objects. Names are looked up in this file's table alone:
tensors become `Tensor`, NumPy arrays `Array`, and all else a `Stranger`, which ignores its arguments.
"""

from __future__ import annotations

import functools
import io
import math
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from densenet_jax.errors import UserError, first_line

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of a file that torch before 1.6 wrote
_DTYPES: dict[str, Any] = {
    **{name: name for name in ("float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8", "bool")},
    **{name: name for name in ("uint16", "uint32", "uint64", "complex64", "complex128")},
    "bfloat16": ml_dtypes.bfloat16,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
    "float8_e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
    "float8_e5m2fnuz": ml_dtypes.float8_e5m2fnuz,
}
_STORAGES = {
    **{"FloatStorage": "float32", "DoubleStorage": "float64", "HalfStorage": "float16", "BFloat16Storage": "bfloat16"},
    **{"LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8"},
    **{"ByteStorage": "uint8", "BoolStorage": "bool", "UntypedStorage": "uint8", "_UntypedStorage": "uint8"},
    **{"ComplexFloatStorage": "complex64", "ComplexDoubleStorage": "complex128"},
}
# Settings and progress that trainers save beside the weights; skipped silently.
_PASSED_OVER = (
    *("argparse", "datetime", "pathlib", "numpy", "torch.optim", "omegaconf", "yacs.config", "easydict"),
    *("pytorch_lightning", "lightning", "lightning_fabric", "lightning_utilities"),
)
_PASSED_OVER_NAMES = ("torch.device", "torch.serialization._get_layout", "torch.nn.parameter.Parameter")
# Hashing a tuple of tuples that share each other takes exponential time, and many tuples or ints can have one hash.
_MAX_KEY_PARTS, _MAX_KEY_INT = 8, 2**60


def _check_keys(keys: Iterable[Any]) -> None:
    """Raises ValueError unless all of these are hashed and compared quickly."""
    for key in keys:
        parts = [key]
        for part in parts:
            if len(parts) > _MAX_KEY_PARTS:
                raise ValueError("a key of a dictionary has too many parts")
            if isinstance(part, tuple | frozenset):
                parts.extend(part)
            elif isinstance(part, int) and abs(part) > _MAX_KEY_INT:
                raise ValueError("a key of a dictionary is too large a number")


def _make_set(values: Iterable[Any] = ()) -> set[Any]:
    values = list(values)
    _check_keys(values)
    return set(values)


def _make_frozenset(values: Iterable[Any] = ()) -> frozenset[Any]:
    return frozenset(_make_set(values))


def _make_dict(content: Any = ()) -> dict[Any, Any]:
    pairs = list(content.items() if isinstance(content, dict) else content)
    _check_keys(key for key, _ in pairs)
    return dict(pairs)


_CONTAINERS = {"set": _make_set, "frozenset": _make_frozenset, "tuple": tuple, "list": list, "dict": _make_dict}


class Stranger:
    """Stands for an object of a class that is not read; `origin` is the class's name."""

    origin = ""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def _ignore(self, *args: Any) -> None:
        """Takes part of the object's content."""

    __setstate__ = __setitem__ = append = extend = add = _ignore


class _Dict(dict):
    """An OrderedDict without attributes: a state dict's `_metadata` is not needed."""

    def __init__(self, content: Any = ()):
        super().__init__(_make_dict(content))

    def __setstate__(self, state: Any) -> None:
        pass


class _DType:
    def __init__(self, code: Any, *args: Any):
        if not isinstance(code, str):
            raise ValueError("a type without a name")
        self.dtype = np.dtype(code)
        if self.dtype.hasobject:
            raise ValueError("an array of objects")

    def __setstate__(self, state: Any) -> None:
        if state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])


class Array:
    """A NumPy array of a pickle, in `value` once the pickle is read."""

    value: np.ndarray

    def __init__(self, *args: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, content = state
        self.fill(content, dtype, shape, "F" if fortran else "C")

    def fill(self, content: bytes | bytearray, dtype: _DType, shape: Any, order: Any) -> None:
        """Sets `value`."""
        self.value = np.frombuffer(content, dtype.dtype).reshape(shape, order=order)


class _Storage:
    def __init__(self, dtype: str):
        self.dtype = np.dtype(_DTYPES[dtype])
        self.content: bytes | Callable[[], bytes] = b""


class Tensor:
    """A PyTorch tensor: a view of a storage, which is read when `value` is asked for."""

    def __init__(self, storage: _Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], dtype: Any):
        self._storage, self._offset, self._shape, self._strides, self.dtype = storage, offset, shape, strides, dtype

    @property
    def value(self) -> np.ndarray:
        """Copies the numbers into a NumPy array.

        Raises:
            ValueError: the view reaches beyond its storage.
        """
        content = self._storage.content
        flat = np.frombuffer(content() if callable(content) else content, self.dtype)
        last = self._offset + sum((side - 1) * stride for side, stride in zip(self._shape, self._strides, strict=True))
        if min(self._offset, *self._shape, *self._strides, 0) < 0 or math.prod(self._shape) > flat.size:
            raise ValueError("a tensor is larger than its storage")
        if not math.prod(self._shape):
            return np.zeros(self._shape, self.dtype)
        if last >= flat.size:
            raise ValueError("a tensor reaches beyond its storage")
        steps = [stride * flat.itemsize for stride in self._strides]
        return np.lib.stride_tricks.as_strided(flat[self._offset :], self._shape, steps).copy()


class _Unpickler(pickle._Unpickler):  # the one in C allocates a table as long as a file's largest memo index
    def __init__(self, file: io.BufferedIOBase, storages: dict[str, _Storage]):
        super().__init__(file, encoding="latin1")
        self.strangers: list[str] = []
        self._storages = storages
        self._known: dict[str, Any] = {
            "collections.OrderedDict": _Dict,
            "collections.defaultdict": self._make_defaultdict,
            "torch.Size": tuple,
            "torch._utils._rebuild_tensor": self._make_tensor,
            "torch._utils._rebuild_tensor_v2": self._make_tensor,
            "torch._utils._rebuild_tensor_v3": self._make_typed_tensor,
            "torch._utils._rebuild_parameter": self._take_first,
            "torch._utils._rebuild_parameter_with_state": self._take_first,
            "torch._tensor._rebuild_from_type_v2": self._make_from_type,
            "torch.storage.UntypedStorage": "uint8",
            "torch.storage._UntypedStorage": "uint8",
            "numpy.ndarray": Array,
            "numpy.dtype": _DType,
            "_codecs.encode": self._encode,
        }
        for core in ("numpy.core", "numpy._core"):
            self._known[f"{core}.multiarray._reconstruct"] = Array
            self._known[f"{core}.numeric._frombuffer"] = self._make_array
        self._known |= {f"torch.{name}": dtype for name, dtype in _STORAGES.items()}
        self._known |= {f"torch.{name}": name for name in _DTYPES}
        for module in ("builtins", "__builtin__"):
            self._known |= {f"{module}.{name}": kind for name, kind in _CONTAINERS.items()}

    def find_class(self, module: str, name: str) -> Any:
        """Looks the name up in this file's tables, else makes a new kind of `Stranger`; imports nothing."""
        full = f"{module}.{name}".encode("unicode_escape").decode()[:100]
        if full in self._known:
            return self._known[full]
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
        return self._storages.setdefault(str(key), _Storage(dtype))

    def _make_tensor(self, storage: _Storage, offset: int, shape: Any, strides: Any, *_: Any) -> Tensor:
        return Tensor(storage, offset, tuple(shape), tuple(strides), storage.dtype)

    def _make_typed_tensor(
        self, storage: Any, offset: Any, shape: Any, strides: Any, grad: Any, hooks: Any, dtype: Any, *_: Any
    ) -> Tensor:
        _check_keys([dtype])
        return Tensor(storage, offset, tuple(shape), tuple(strides), np.dtype(_DTYPES[dtype]))

    def _make_from_type(self, function: Any, kind: Any, args: Any, *_: Any) -> Any:
        return function(*args)

    def _make_defaultdict(self, *_: Any) -> _Dict:
        return _Dict()

    def _make_array(self, content: Any, dtype: _DType, shape: Any, order: str) -> Array:
        array = Array()
        array.fill(content, dtype, shape, order)
        return array

    def _encode(self, text: str, encoding: str) -> bytes:
        return text.encode("latin1")

    def _take_first(self, first: Any, *_: Any) -> Any:
        return first


def _check_before(load: Callable[[Any], None], keys: slice) -> Callable[[Any], None]:
    def checked(unpickler: Any) -> None:
        _check_keys(unpickler.stack[keys])
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

    Returns it with the names of the classes in it that are in no table of this file.

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
    storages: dict[str, _Storage] = {}
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
    storages: dict[str, _Storage] = {}
    unpickler = _Unpickler(file, storages)
    content = unpickler.load()
    if content != _LEGACY_MAGIC:
        return content, unpickler.strangers
    for _ in range(2):  # version of the format, sizes of the machine's numbers
        _Unpickler(file, storages).load()
    unpickler = _Unpickler(file, storages)
    content = unpickler.load()
    for key in _Unpickler(file, storages).load():
        _check_keys([key])
        storage = storages[str(key)]
        (count,) = struct.unpack("<q", file.read(8))
        size = count * storage.dtype.itemsize
        storage.content = file.read(max(size, 0))
        if len(storage.content) != size:
            raise ValueError("the file ends early")
    return content, unpickler.strangers
