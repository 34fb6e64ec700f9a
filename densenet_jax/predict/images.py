"""Turns unchecked files, bytes and arrays into pixels, or rejects them with one clear reason.

Everything that the first bytes reveal is checked before anything is decoded.
"""

import dataclasses
import os
import stat
from typing import Any, TypeAlias

import numpy as np

from densenet_jax.data.decode import decode_image, with_bits
from densenet_jax.data.headers import MAX_PIXELS, image_size
from densenet_jax.data.pixels import Stored, stored_array, to_pixels
from densenet_jax.data.records import DamagedImage
from densenet_jax.errors import UserError, first_line

ImageSource: TypeAlias = str | os.PathLike[str] | bytes | np.ndarray
_JPEG_SCANS = 100  # progressive encoders write about ten; each costs a pass over all pixels
_KINDS = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
_KINDS |= dict.fromkeys((stat.S_IFCHR, stat.S_IFBLK), "a device")


class ImageError(UserError):
    """A rejected image: `name` and `why`, the reason without the name."""

    def __init__(self, name: str, why: str) -> None:
        super().__init__(f"{name}: {why}")
        self.name = name
        self.why = why


@dataclasses.dataclass(frozen=True)
class ImageLimits:
    """Limits above which an image is rejected."""

    max_bytes: int = 64 * 2**20  # in the encoded file
    max_pixels: int = MAX_PIXELS  # of the decoded image; `densenet_jax.data.headers.MAX_PIXELS` holds besides


DEFAULT_LIMITS = ImageLimits()


def shown(name: str | os.PathLike[str], most: int = 500) -> str:
    """Returns a file's name on one line, with no control characters that a terminal would obey."""
    text = os.fspath(name)
    text = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)
    return text if len(text) <= most else f"{text[: most // 2]}...{text[-most // 2 :]}"


def name_of(source: ImageSource) -> str:
    """Returns the name of an image in messages: its path, or that it is bytes or an array."""
    if isinstance(source, str | os.PathLike):
        return shown(source)
    return "an array" if isinstance(source, np.ndarray) else "the image"


def read_file(path: str | os.PathLike[str], limits: ImageLimits = DEFAULT_LIMITS) -> bytes:
    """Reads a regular file that is not too large; never waits for a pipe and never opens a device.

    Raises:
        ImageError: it is anything else, or can't be read.
    """
    name = shown(path)
    try:
        _check_kind(os.stat(path).st_mode, name)
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            _check_kind(os.fstat(descriptor).st_mode, name)  # it may have been replaced meanwhile
            data = file.read(limits.max_bytes + 1)
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise ImageError(name, f"it can't be read ({getattr(error, 'strerror', None) or error})") from error
    check_bytes(data, name, limits)
    return data


def _check_kind(mode: int, name: str) -> None:
    if not stat.S_ISREG(mode):
        raise ImageError(name, f"it is {_KINDS.get(stat.S_IFMT(mode), 'no file')}, not an image file")


def check_bytes(data: bytes, name: str = "the image", limits: ImageLimits = DEFAULT_LIMITS) -> None:
    """Checks the size and first bytes of an encoded image; decodes nothing.

    Raises:
        ImageError: it is empty, no image, or would take too much memory or time to decode.
    """
    if not data:
        raise ImageError(name, "it is empty")
    if len(data) > limits.max_bytes:
        raise ImageError(name, f"it has more than {limits.max_bytes:,} bytes")
    try:
        width, height = image_size(data, name)
    except DamagedImage as error:
        raise ImageError(name, error.why) from error
    _check_pixel_count(width, height, name, limits)
    if data[:2] == b"\xff\xd8" and data.count(b"\xff\xda") > _JPEG_SCANS:
        raise ImageError(name, f"it has more than {_JPEG_SCANS} JPEG scans")


def _check_pixel_count(width: int, height: int, name: str, limits: ImageLimits) -> None:
    if width < 1 or height < 1 or width * height > limits.max_pixels:
        raise ImageError(name, f"it has {width}x{height} pixels, at most {limits.max_pixels} are decoded")


def check_array(array: np.ndarray, name: str = "an array", limits: ImageLimits = DEFAULT_LIMITS) -> Stored:
    """Checks pixels [height, width] or [height, width, channels], of uint8, uint16 or floats in [0, 1].

    Raises:
        ImageError: it is not such an array, or too large.
    """
    try:
        stored = stored_array(array)
    except ValueError as error:
        raise ImageError(name, str(error)) from error
    _check_pixel_count(array.shape[1], array.shape[0], name, limits)
    return stored


def load_image(
    source: ImageSource, channels: int = 3, *, name: str = "", limits: ImageLimits = DEFAULT_LIMITS, **decoding: Any
) -> np.ndarray:
    """Decodes an untrusted image to uint8 or uint16 [height, width, channels], turned as its EXIF data say.

    Args:
        source: a file's path, the file's bytes (JPEG, PNG, WebP, GIF, BMP, PPM, TIFF, NPY or DICOM; of an animation its
            first frame), or an array as in `check_array`.
        channels: 3 for RGB, 1 for gray, else the number that the image has.
        name: name of the image in messages; "" uses its path.
        decoding: `pixel_range`, `bits` and `dicom_frame` of `densenet_jax.data.decode.decode_image`.

    Raises:
        ImageError: it is rejected; the message says why.
    """
    name = name or name_of(source)
    try:
        if isinstance(source, np.ndarray):
            pixels = to_pixels(check_array(source, name, limits), channels, decoding.get("pixel_range", ()))
            return with_bits(pixels, decoding.get("bits", 8), name)
        data = read_encoded(source, name, limits)
        return decode_image(data, channels, name=name, apply_exif_orientation=True, **decoding)
    except (DamagedImage, ValueError) as error:
        raise ImageError(name, error.why if isinstance(error, DamagedImage) else first_line(error)) from error


def read_encoded(source: ImageSource, name: str, limits: ImageLimits) -> bytes:
    """Returns the checked bytes of a path or of bytes.

    Raises:
        ImageError: they are rejected, or `source` is neither.
    """
    if isinstance(source, bytes | bytearray | memoryview):
        check_bytes(data := bytes(source), name, limits)
        return data
    if isinstance(source, str | os.PathLike):
        return read_file(source, limits)
    raise ImageError(name, f"it is a {type(source).__name__}, expected a path, bytes or an array")
