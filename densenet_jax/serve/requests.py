"""Requests for inference, checked before any of them may cost much or join a batch.

A request's input is one tensor of the Open Inference Protocol: `image`, UINT8 (UINT16 for a model of 16-bit pixels)
[n, h, w, c], pixels as given to the model; or `image_bytes`, BYTES [n], encoded pictures of any size.
"""

import array
import base64
import binascii
import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from densenet_jax.data.decode import DamagedImage, declared_size, image_size

PIXELS, ENCODED = "image", "image_bytes"
MAX_PICTURE_PIXELS = 50_000_000
MAX_ID_LENGTH = 128  # of a request's id, which the answer repeats


class RequestError(Exception):
    """A rejected request; the message is for its sender.

    Attributes:
        status: HTTP status; gRPC has an equivalent of each.
    """

    def __init__(self, message: str, status: int = 400):
        super().__init__(message)
        self.status = status


@dataclasses.dataclass(frozen=True)
class Tensor:
    """An input as it arrived."""

    name: str
    datatype: str
    shape: Sequence[int]  # as stated by the client
    data: Any  # a list, nested or flat; or bytes, little-endian, as raw contents hold them
    is_base64: bool = True  # bytes are encoded, as JSON requires


@dataclasses.dataclass(frozen=True)
class Wanted:
    """An output that a request asks for."""

    name: str
    classes: int = 0  # classification extension: n best classes as "probability:number:label"
    is_binary: bool = False  # after the JSON of a REST answer instead of inside


@dataclasses.dataclass(frozen=True)
class Request:
    """A request for inference, of either protocol."""

    tensors: Sequence[Tensor]
    outputs: Sequence[Wanted] = ()  # none: all
    request_id: str | None = None  # repeated in the answer
    is_binary: bool = False  # for outputs that are not named


@dataclasses.dataclass(frozen=True)
class Picture:
    """An encoded picture and the number of pixels in its header."""

    data: bytes
    name: str
    pixels: int


@dataclasses.dataclass(frozen=True)
class InputChecker:
    """Checks the input of a request and adds up its cost."""

    image_shape: tuple[int, ...]  # (h, w, c), or (crops, h, w, c)
    max_images: int
    max_pixels: int  # of all pictures of a request together, before resizing
    dtype: np.dtype  # of pixels: uint8 or uint16

    def check(self, request: Request) -> np.ndarray | list[Picture]:
        """Returns the pixels of a request, [n, h, w, c], or its pictures, not decoded; raises RequestError."""
        check_id(request.request_id)
        tensors = request.tensors
        if len(tensors) != 1 or tensors[0].name not in (PIXELS, ENCODED):
            names = ", ".join(shorten(tensor.name) for tensor in tensors[:4]) or "none"
            raise RequestError(
                f"the inputs are {names}; expected one of {PIXELS} ({self.datatype}) and {ENCODED} (BYTES)"
            )
        return self._pixels(tensors[0]) if tensors[0].name == PIXELS else self._pictures(tensors[0])

    @functools.cached_property
    def datatype(self) -> str:
        """The protocol's name for `dtype`."""
        return self.dtype.name.upper()

    def _pixels(self, tensor: Tensor) -> np.ndarray:
        check_datatype(tensor, self.datatype)
        shape = tuple(tensor.shape)
        if not shape or shape[1:] != tuple(self.image_shape):
            expected = ", ".join(map(str, ("n", *self.image_shape)))
            raise RequestError(f"{PIXELS} has the shape {shorten(list(shape))}; expected [{expected}]")
        self._check_count(shape[0])
        data = tensor.data if isinstance(tensor.data, bytes) else pack_pixels(tensor.data, shape, self.dtype)
        count = len(data) / self.dtype.itemsize
        if count != math.prod(shape):
            raise RequestError(f"{PIXELS} has {count:.12g} values; its shape {list(shape)} takes {math.prod(shape)}")
        return np.frombuffer(data, self.dtype).reshape(shape)

    def _pictures(self, tensor: Tensor) -> list[Picture]:
        check_datatype(tensor, "BYTES")
        shape = tuple(tensor.shape)
        if not (len(shape) == 1 or (len(shape) == 2 and shape[1] == 1)):
            raise RequestError(f"{ENCODED} has the shape {shorten(list(shape))}; expected [n]")
        self._check_count(shape[0])
        data = tensor.data
        if isinstance(data, bytes):
            data = unpack_strings(data, most=shape[0])
        if not isinstance(data, list) or len(data) != shape[0]:
            count = len(data) if isinstance(data, list) else "no list of"
            raise RequestError(f"{ENCODED} has {count} values; its shape {list(shape)} takes {shape[0]}")
        pictures, left = [], self.max_pixels
        for number, value in enumerate(data):
            pictures.append(make_picture(value, f"{ENCODED}[{number}]", tensor.is_base64))
            left -= pictures[-1].pixels
            if left < 0:
                raise RequestError(f"the pictures have more than {self.max_pixels:,} pixels together; send fewer", 413)
        return pictures

    def _check_count(self, count: int) -> None:
        if not 1 <= count <= self.max_images:
            raise RequestError(f"{shorten(count)} images in a request; expected 1 to {self.max_images}")


def make_picture(value: Any, name: str, is_base64: bool) -> Picture:
    """Reads the size of an encoded picture from its first bytes; raises RequestError if it is none, or too large."""
    if isinstance(value, list) and len(value) == 1:  # shape [n, 1]
        value = value[0]
    if isinstance(value, str) or is_base64:
        try:
            value = base64.b64decode(value, validate=True)
        except (binascii.Error, TypeError, ValueError) as error:
            raise RequestError(f"{name} is not base64 ({error})") from error
    try:
        width, height = declared_size(value) or image_size(value, name)
    except DamagedImage as error:
        raise RequestError(f"{name}: {error.why}") from error
    if width * height > MAX_PICTURE_PIXELS:
        raise RequestError(f"{name}: it has {width}x{height} pixels, at most {MAX_PICTURE_PIXELS} are decoded")
    return Picture(value, name, width * height)


def check_datatype(tensor: Tensor, datatype: str) -> None:
    """Raises RequestError if the tensor is not of `datatype`."""
    if tensor.datatype != datatype:
        raise RequestError(f"{tensor.name} is of the datatype {shorten(tensor.datatype)}; expected {datatype}")


def pack_pixels(values: Any, shape: tuple[int, ...], dtype: np.dtype) -> bytes:
    """Packs a list of numbers of `dtype`, flat or nested like `shape`.

    NumPy would also convert strings and ragged lists, at any cost in memory.
    """
    if not isinstance(values, list):
        raise RequestError(f"the data of {PIXELS} is no list of numbers")
    if values and isinstance(values[0], list):
        for size in shape[1:]:
            if not all(isinstance(value, list) and len(value) == size for value in values):
                raise RequestError(f"the data of {PIXELS} is not nested as its shape {list(shape)}")
            values = list(itertools.chain.from_iterable(values))
    try:
        return array.array(dtype.char, values).tobytes()
    except (TypeError, ValueError, OverflowError) as error:
        most = np.iinfo(dtype).max
        raise RequestError(f"the data of {PIXELS} is not all whole numbers from 0 to {most}") from error


def unpack_strings(raw: bytes, most: int) -> list[bytes]:
    """Splits raw contents into strings, each after its length (32 bits, little-endian); at most one over `most`."""
    strings: list[bytes] = []
    start = 0
    while start < len(raw) and len(strings) <= most:
        end = start + 4 + int.from_bytes(raw[start : start + 4], "little")
        if start + 4 > len(raw) or end > len(raw):
            raise RequestError(f"the raw contents of {ENCODED} end within a string")
        strings.append(raw[start + 4 : end])
        start = end
    return strings


def pack_array(values: np.ndarray) -> bytes:
    """Packs an output as raw contents; strings in the format of `unpack_strings`."""
    if values.dtype != object:
        return values.astype(values.dtype.newbyteorder("<"), copy=False).tobytes()
    texts = [text.encode() for text in values.flat]
    return b"".join(len(text).to_bytes(4, "little") + text for text in texts)


def check_id(request_id: str | None) -> None:
    """Raises RequestError if an id is too long to send back, or has characters other than printable ASCII."""
    fine = request_id is None or (
        len(request_id) <= MAX_ID_LENGTH and request_id.isascii() and request_id.isprintable()
    )
    if not fine:
        raise RequestError(f"the request's id is not of at most {MAX_ID_LENGTH} printable ASCII characters")


def shorten(value: Any, most: int = 60) -> str:
    """Shortens a value from a client for use in an error message."""
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= most else f"{text[: most - 3]}..."
