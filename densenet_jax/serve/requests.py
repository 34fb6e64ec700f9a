"""Requests for inference, checked before any of them may cost much or join a batch.

A request's input is one tensor of the Open Inference Protocol: `image`, UINT8 (UINT16 for a model of 16-bit pixels)
[n, h, w, c], pixels as given to the model; or `image_bytes`, BYTES [n], encoded pictures of any size.
"""

import array
import base64
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from densenet_jax.data.headers import declared_size, image_size
from densenet_jax.data.records import DamagedImage

# The protocol's names of NumPy's types; strings are objects.
DATATYPES = {"uint8": "UINT8", "uint16": "UINT16", "int32": "INT32", "float32": "FP32", "object": "BYTES"}
PIXELS, ENCODED = "image", "image_bytes"
MAX_PICTURE_PIXELS = 50_000_000
MAX_ID_LENGTH = 128  # of a request's id, which the answer repeats


class RequestError(Exception):
    """A rejected request: a message for its sender and a status of HTTP, of which gRPC has equivalents."""

    def __init__(self, message: str, status: int = 400):
        super().__init__(message)
        self.status = status


class Tensor(NamedTuple):
    """An input as it arrived."""

    name: str
    datatype: str
    shape: Sequence[int]  # as stated by the client
    data: Any  # a list, nested or flat; or bytes, little-endian, as raw contents hold them
    is_base64: bool = True  # bytes are encoded, as JSON requires


class Wanted(NamedTuple):
    """An output that a request asks for."""

    name: str
    classes: int = 0  # classification extension: n best classes as "probability:number:label"
    is_binary: bool = False  # after the JSON of a REST answer instead of inside


class Request(NamedTuple):
    """A request for inference, of either protocol."""

    tensors: Sequence[Tensor]
    outputs: Sequence[Wanted] = ()  # none: all
    request_id: str | None = None  # repeated in the answer
    is_binary: bool = False  # for outputs that are not named


class Picture(NamedTuple):
    """An encoded picture and the number of pixels in its header."""

    data: bytes
    name: str
    pixels: int


class InputChecker:
    """Checks the input of a request and adds up its cost."""

    def __init__(self, image_shape: tuple[int, ...], dtype: np.dtype, max_images: int, max_pixels: int):
        """Takes the shape and type of pixels, and limits of a request: images, and their pixels before resizing."""
        # Datatype of each, and the shape of one image.
        self.inputs = {PIXELS: (DATATYPES[dtype.name], image_shape), ENCODED: ("BYTES", ())}
        self.dtype, self.max_images, self.max_pixels = dtype, max_images, max_pixels

    def check(self, request: Request) -> np.ndarray | list[Picture]:
        """Returns the pixels of a request, [n, h, w, c], or its pictures, not decoded; raises RequestError."""
        request_id, names = request.request_id or "", [tensor.name for tensor in request.tensors]
        if len(request_id) > MAX_ID_LENGTH or not (request_id.isascii() and request_id.isprintable()):
            raise RequestError(f"the request's id is not of at most {MAX_ID_LENGTH} printable ASCII characters")
        if len(names) != 1 or names[0] not in self.inputs:
            given = ", ".join(map(shorten, names[:4])) or "none"
            known = " and ".join(f"{name} ({datatype})" for name, (datatype, _) in self.inputs.items())
            raise RequestError(f"the inputs are {given}; expected one of {known}")
        tensor, is_pixels = request.tensors[0], names[0] == PIXELS
        datatype, image_shape = self.inputs[tensor.name]
        if tensor.datatype != datatype:
            raise RequestError(f"{tensor.name} is of the datatype {shorten(tensor.datatype)}; expected {datatype}")
        shape = tuple(tensor.shape)
        is_of_images = shape[1:] == image_shape or (shape[1:] == (1,) and not is_pixels)
        if not is_of_images or set(map(type, shape)) != {int}:
            expected = ", ".join(map(str, ("n", *image_shape)))
            raise RequestError(f"{tensor.name} has the shape {shorten(list(shape))}; expected [{expected}]")
        if not 1 <= shape[0] <= self.max_images:
            raise RequestError(f"{shorten(shape[0])} images in a request; expected 1 to {self.max_images}")
        if not isinstance(tensor.data, bytes | list):
            raise RequestError(f"the data of {tensor.name} is no list of values")
        data: Any = tensor.data
        if is_pixels:
            data = data if isinstance(data, bytes) else pack_pixels(data, shape, self.dtype)
        elif isinstance(data, bytes):
            data = unpack_strings(data, most=shape[0])
        count = len(data) / (self.dtype.itemsize if is_pixels else 1)
        if count != (total := math.prod(shape)):
            raise RequestError(f"{tensor.name} has {count:.12g} values; its shape {list(shape)} takes {total}")
        if is_pixels:
            return np.frombuffer(data, self.dtype).reshape(shape)
        pictures = [make_picture(one, f"{ENCODED}[{number}]", tensor.is_base64) for number, one in enumerate(data)]
        if sum(picture.pixels for picture in pictures) > self.max_pixels:
            raise RequestError(f"the pictures have more than {self.max_pixels:,} pixels together; send fewer", 413)
        return pictures


def make_picture(value: Any, name: str, is_base64: bool) -> Picture:
    """Reads the size of an encoded picture from its first bytes; raises RequestError if it is none, or too large."""
    if isinstance(value, list) and len(value) == 1:  # shape [n, 1]
        value = value[0]
    if isinstance(value, str) or is_base64:
        try:
            value = base64.b64decode(value, validate=True)
        except (TypeError, ValueError) as error:
            raise RequestError(f"{name} is not base64 ({error})") from error
    if not isinstance(value, bytes):
        raise RequestError(f"{name} is no picture but of the type {type(value).__name__}")
    try:
        width, height = declared_size(value) or image_size(value, name)
    except DamagedImage as error:
        raise RequestError(f"{name}: {error.why}") from error
    if width * height > MAX_PICTURE_PIXELS:
        raise RequestError(f"{name}: it has {width}x{height} pixels, at most {MAX_PICTURE_PIXELS} are decoded")
    return Picture(value, name, width * height)


def pack_pixels(values: list[Any], shape: tuple[int, ...], dtype: np.dtype) -> bytes:
    """Packs a list of numbers of `dtype`, flat or nested like `shape`.

    NumPy would also convert strings and ragged lists, at any cost in memory.
    """
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


def shorten(value: Any, most: int = 60) -> str:
    """Shortens a value from a client for use in an error message."""
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= most else f"{text[: most - 3]}..."
