"""Stand-ins for the objects of PyTorch's and NumPy's pickles, by the names of what rebuilds them there."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import ml_dtypes
import numpy as np

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
# Hashing a tuple of tuples that share each other takes exponential time, and many tuples or ints can have one hash.
_MAX_KEY_PARTS, _MAX_KEY_INT = 8, 2**60


def check_keys(keys: Iterable[Any]) -> None:
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
    check_keys(values)
    return set(values)


def _make_dict(content: Any = ()) -> dict[Any, Any]:
    pairs = list(content.items() if isinstance(content, dict) else content)
    check_keys(key for key, _ in pairs)
    return dict(pairs)


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
        self.value = np.frombuffer(content, dtype.dtype).reshape(shape, order="F" if fortran else "C")


class Storage:
    """The numbers of PyTorch tensors: bytes, or a function that reads them."""

    def __init__(self, dtype: str):
        self.dtype = np.dtype(_DTYPES[dtype])
        self.content: bytes | Callable[[], bytes] = b""


class Tensor:
    """A PyTorch tensor: a view of a storage, which is read when `value` is asked for."""

    def __init__(self, storage: Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], dtype: Any):
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


def _make_tensor(storage: Storage, offset: int, shape: Any, strides: Any, *_: Any) -> Tensor:
    return Tensor(storage, offset, tuple(shape), tuple(strides), storage.dtype)


def _make_typed_tensor(
    storage: Any, offset: Any, shape: Any, strides: Any, grad: Any, hooks: Any, dtype: Any, *_: Any
) -> Tensor:
    check_keys([dtype])
    return Tensor(storage, offset, tuple(shape), tuple(strides), np.dtype(_DTYPES[dtype]))


def _make_array(content: Any, dtype: _DType, shape: Any, order: str) -> Array:
    array = Array()
    array.__setstate__((1, shape, dtype, order == "F", content))
    return array


_CONTAINERS = {
    **{"set": _make_set, "frozenset": lambda *values: frozenset(_make_set(*values))},
    **{"tuple": tuple, "list": list, "dict": _make_dict},
}
KNOWN: dict[str, Any] = {
    "collections.OrderedDict": _Dict,
    "collections.defaultdict": lambda *_: _Dict(),
    "torch.Size": tuple,
    "torch._utils._rebuild_tensor": _make_tensor,
    "torch._utils._rebuild_tensor_v2": _make_tensor,
    "torch._utils._rebuild_tensor_v3": _make_typed_tensor,
    "torch._utils._rebuild_parameter": lambda first, *_: first,
    "torch._utils._rebuild_parameter_with_state": lambda first, *_: first,
    "torch._tensor._rebuild_from_type_v2": lambda function, kind, args, *_: function(*args),
    "torch.storage.UntypedStorage": "uint8",
    "torch.storage._UntypedStorage": "uint8",
    "numpy.ndarray": Array,
    "numpy.dtype": _DType,
    "_codecs.encode": lambda text, encoding: text.encode("latin1"),
    **{f"numpy.{core}.multiarray._reconstruct": Array for core in ("core", "_core")},
    **{f"numpy.{core}.numeric._frombuffer": _make_array for core in ("core", "_core")},
    **{f"torch.{name}": dtype for name, dtype in _STORAGES.items()},
    **{f"torch.{name}": name for name in _DTYPES},
    **{f"{top}.{name}": make for top in ("builtins", "__builtin__") for name, make in _CONTAINERS.items()},
}
