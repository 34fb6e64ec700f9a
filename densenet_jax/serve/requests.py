"""What a client sent, checked and turned into pixels before it may join a batch.

The input of a request is one tensor of the Open Inference Protocol: `image`, UINT8 [n, h, w, c], pixels as the model
is given them; or `image_bytes`, BYTES [n], encoded pictures of any size.
"""

import base64
import binascii
import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from densenet_jax.data.pixels import join
from densenet_jax.errors import UserError

PIXELS, ENCODED = "image", "image_bytes"
# Of a request's id, which comes back in the answer.
MAX_ID_LENGTH = 128


class RequestError(Exception):
    """A mistake in one request; the message is for its sender."""


@dataclasses.dataclass(frozen=True)
class Tensor:
    """An input as it came.

    Attributes:
        name: which input it is.
        datatype: a name of the protocol, such as "UINT8".
        shape: as the client states it.
        data: a list, nested or flat; or bytes, little-endian, as gRPC's raw contents.
        is_base64: whether strings of bytes are in base64, as JSON needs.
    """

    name: str
    datatype: str
    shape: Sequence[int]
    data: Any
    is_base64: bool = True


@dataclasses.dataclass(frozen=True)
class Request:
    """A request for inference, of either protocol.

    Attributes:
        model: the name it asks for.
        version: of the model; "" is any.
        request_id: comes back in the answer; None: there is none.
        tensors: its inputs.
        outputs: names of those it wants; None: all.
    """

    model: str
    version: str
    request_id: str | None
    tensors: Sequence[Tensor]
    outputs: Sequence[str] | None


@dataclasses.dataclass(frozen=True)
class Reader:
    """Turns requests into pixels.

    Attributes:
        image_shape: of what the model looks at, (h, w, c), or (crops, h, w, c).
        max_images: most images of a request.
        decode: an encoded picture, and what errors call it, to uint8[image_shape]; raises `UserError`.
    """

    image_shape: tuple[int, ...]
    max_images: int
    decode: Callable[[bytes, str], np.ndarray]

    def read(self, tensors: Sequence[Tensor]) -> np.ndarray:
        """The images of a request, uint8 [n, h, w, c].

        Raises:
            RequestError: the request is not one that can be answered; the message says why.
        """
        if len(tensors) != 1 or tensors[0].name not in (PIXELS, ENCODED):
            names = ", ".join(shortened(tensor.name) for tensor in tensors[:4]) or "none"
            raise RequestError(f"the inputs are {names}; expected one of {PIXELS} (UINT8) and {ENCODED} (BYTES)")
        tensor = tensors[0]
        return self._pixels(tensor) if tensor.name == PIXELS else self._encoded(tensor)

    def _pixels(self, tensor: Tensor) -> np.ndarray:
        expect_datatype(tensor, "UINT8")
        shape = tuple(tensor.shape)
        if not shape or shape[1:] != tuple(self.image_shape):
            expected = ", ".join(map(str, ("n", *self.image_shape)))
            raise RequestError(f"{PIXELS} has the shape {shortened(list(shape))}; expected [{expected}]")
        self._expect_count(shape[0])
        data = tensor.data if isinstance(tensor.data, bytes) else as_bytes(tensor.data, shape)
        if len(data) != math.prod(shape):
            raise RequestError(f"{PIXELS} has {len(data)} values; its shape {list(shape)} takes {math.prod(shape)}")
        return np.frombuffer(data, np.uint8).reshape(shape)

    def _encoded(self, tensor: Tensor) -> np.ndarray:
        expect_datatype(tensor, "BYTES")
        shape = tuple(tensor.shape)
        if not (len(shape) == 1 or (len(shape) == 2 and shape[1] == 1)):
            raise RequestError(f"{ENCODED} has the shape {shortened(list(shape))}; expected [n]")
        self._expect_count(shape[0])
        pictures = tensor.data
        if isinstance(pictures, bytes):
            pictures = unpack_strings(pictures, most=shape[0])
        if not isinstance(pictures, list) or len(pictures) != shape[0]:
            count = len(pictures) if isinstance(pictures, list) else "no list of"
            raise RequestError(f"{ENCODED} has {count} values; its shape {list(shape)} takes {shape[0]}")
        return join([self._picture(number, picture, tensor.is_base64) for number, picture in enumerate(pictures)])

    def _picture(self, number: int, picture: Any, is_base64: bool) -> np.ndarray:
        if isinstance(picture, list) and len(picture) == 1:  # of the shape [n, 1]
            picture = picture[0]
        if isinstance(picture, str) or is_base64:
            picture = from_base64(picture, number)
        try:
            return self.decode(picture, f"{ENCODED}[{number}]")
        except UserError as error:
            raise RequestError(str(error)) from error

    def _expect_count(self, count: int) -> None:
        if not 1 <= count <= self.max_images:
            raise RequestError(f"{shortened(count)} images in a request; expected 1 to {self.max_images}")


def expect_datatype(tensor: Tensor, datatype: str) -> None:
    """Checks that the tensor says it is of `datatype`."""
    if tensor.datatype != datatype:
        raise RequestError(f"{tensor.name} is of the datatype {shortened(tensor.datatype)}; expected {datatype}")


def as_bytes(values: Any, shape: tuple[int, ...]) -> bytes:
    """A list of numbers from 0 to 255, flat or nested as `shape` says, as bytes.

    NumPy would make the array, but of strings and ragged lists too, at any cost in memory.
    """
    if not isinstance(values, list):
        raise RequestError(f"the data of {PIXELS} is no list of numbers")
    if values and isinstance(values[0], list):
        for size in shape[1:]:
            if not all(isinstance(value, list) and len(value) == size for value in values):
                raise RequestError(f"the data of {PIXELS} is not nested as its shape {list(shape)}")
            values = list(itertools.chain.from_iterable(values))
    try:
        return bytes(values)
    except (TypeError, ValueError) as error:
        raise RequestError(f"the data of {PIXELS} is not all whole numbers from 0 to 255") from error


def from_base64(text: Any, number: int) -> bytes:
    """The bytes that `text` stands for."""
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, TypeError, ValueError) as error:
        raise RequestError(f"{ENCODED}[{number}] is not base64 ({error})") from error


def unpack_strings(raw: bytes, most: int) -> list[bytes]:
    """Strings after their lengths (32 bits, little-endian), as raw contents hold them; at most one over `most`."""
    strings: list[bytes] = []
    start = 0
    while start < len(raw) and len(strings) <= most:
        end = start + 4 + int.from_bytes(raw[start : start + 4], "little")
        if start + 4 > len(raw) or end > len(raw):
            raise RequestError(f"the raw contents of {ENCODED} end within a string")
        strings.append(raw[start + 4 : end])
        start = end
    return strings


def pack_strings(strings: Sequence[bytes]) -> bytes:
    """The reverse of `unpack_strings`."""
    return b"".join(len(string).to_bytes(4, "little") + string for string in strings)


def check_id(request_id: Any) -> None:
    """Checks what comes back in the answer.

    Raises:
        RequestError: it is too long, or has other characters than printable ASCII.
    """
    fine = isinstance(request_id, str) and len(request_id) <= MAX_ID_LENGTH
    if not fine or not (request_id.isascii() and request_id.isprintable()):
        raise RequestError(f"the request's id is not of at most {MAX_ID_LENGTH} printable ASCII characters")


def wanted_outputs(names: Sequence[str] | None, known: Mapping[str, Any]) -> list[str]:
    """The outputs that a request asks for, in its order; all where it names none.

    Raises:
        RequestError: there is no such output.
    """
    for name in names or ():
        if name not in known:
            raise RequestError(f"there is no output {shortened(name)}; expected some of {', '.join(known)}")
    return list(dict.fromkeys(names or known))


def shortened(value: Any, most: int = 60) -> str:
    """What a client sent, fit to be said back in an error."""
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= most else f"{text[: most - 3]}..."
