"""Encoded image files to uint8 pixels: JPEG by libjpeg-turbo, everything else by Pillow."""

import io
import struct
import zlib

import cv2
import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from densenet_jax.errors import UserError, first_line

MAX_PIXELS = 80_000_000  # larger images are refused before memory is spent on them; ImageNet's largest has 32 million
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM", "TIFF")  # Pillow knows more, some of which start programs
_ORIENTATION = 0x0112  # the EXIF tag
_SMALL_BYTES = 4096
_EXACT_JPEG = {"fastdct": False, "fastupsample": False}  # the pixels that Pillow gives


class DamagedImage(UserError):  # noqa: N818  (what it is, in the data set's words)
    """An image that can't be read or decoded; the message names it and says why."""

    def __init__(self, name: str, why: str) -> None:
        super().__init__(f"Image {name} can't be decoded: {why}.")
        self.name = name
        self.why = why


def decode_image(
    data: bytes, channels: int = 3, *, name: str = "image", apply_exif_orientation: bool = False
) -> np.ndarray:
    """Decodes an image file of one of `FORMATS`, with the pixels that Pillow gives; of an animation the first frame.

    Args:
        data: the file's bytes.
        channels: 3 for RGB, 1 for gray. Alpha is dropped, palettes are looked up, CMYK is converted, 16 bits are
            scaled to 8.
        name: what a message calls the image.
        apply_exif_orientation: turn the image as its camera said. Off for data sets: the published ImageNet weights
            were trained and evaluated on pixels as they are stored.

    Returns:
        uint8[height, width, channels].

    Raises:
        DamagedImage: the file is truncated, no image, or has more than `MAX_PIXELS` pixels.
    """
    try:
        if size := _declared_size(data):
            check_size(*size, name)
        pixels = _decode_jpeg(data, channels, name) if data[:2] == b"\xff\xd8" else None
        if pixels is None:
            pixels = _decode_small_png(data, channels)
        if pixels is None:
            pixels = _decode_with_pillow(data, channels, name)
        return _oriented(pixels, data) if apply_exif_orientation else pixels
    except DamagedImage:
        raise
    except Exception as error:  # decoders raise nearly anything on garbage
        raise DamagedImage(name, _reason(error)) from error


def is_image_start(head: bytes) -> bool:
    """Returns whether a file that begins with these 32 bytes is meant to be one of `FORMATS`."""
    if head[:2] == b"BM":  # a text may begin so too: the size of the second header tells
        return head[14:18] in (bytes((size, 0, 0, 0)) for size in (12, 40, 52, 56, 64, 108, 124))
    if head[:1] == b"P":
        return head[1:2] in b"123456" and head[2:3] in (b" ", b"\n", b"\r", b"\t")
    starts = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
    return head.startswith(starts) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return f"it is no {', '.join(FORMATS[:-1])} or {FORMATS[-1]} image"
    return first_line(error).rstrip(".")


def check_size(width: int, height: int, name: str) -> None:
    """Raises DamagedImage where an image of this size is not to be decoded."""
    if width < 1 or height < 1 or width * height > MAX_PIXELS:
        raise DamagedImage(name, f"it claims {width}x{height} pixels, at most {MAX_PIXELS} are decoded")


def image_size(data: bytes, name: str = "image") -> tuple[int, int]:
    """(width, height) as the file's first bytes say; decodes nothing.

    Raises:
        DamagedImage: it is no image, or one that is too large to be decoded.
    """
    if size := jpeg_size(data, name):
        return size[1], size[0]
    if size := _declared_size(data):
        check_size(*size, name)
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
    except Exception as error:
        raise DamagedImage(name, _reason(error)) from error
    check_size(width, height, name)
    return width, height


def _declared_size(data: bytes) -> tuple[int, int] | None:
    """(width, height) of a PNG, WebP or GIF by its first bytes alone; None of other files.

    Pillow checks sizes too, but of WebP only after the memory for the whole canvas was asked for.
    """
    if data[:8] == b"\x89PNG\r\n\x1a\n" and len(data) >= 24:
        return struct.unpack(">II", data[16:24])
    if data[:4] == b"GIF8" and len(data) >= 10:
        return struct.unpack("<HH", data[6:10])
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP" or len(data) < 30:
        return None
    if data[12:16] == b"VP8X":
        return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
    if data[12:16] == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    width, height = struct.unpack("<HH", data[26:30])
    return width & 0x3FFF, height & 0x3FFF


def jpeg_size(data: bytes, name: str) -> tuple[int, int] | None:
    """(height, width) as the file's first bytes say, or None where it is no JPEG.

    Raises:
        DamagedImage: the image is too large to be decoded.
    """
    if data[:2] != b"\xff\xd8":
        return None
    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    check_size(width, height, name)
    return height, width


def _decode_jpeg(data: bytes, channels: int, name: str) -> np.ndarray | None:
    """None where libjpeg-turbo's simple call has no opinion: Pillow then judges."""
    try:
        height, width, colors, _ = simplejpeg.decode_jpeg_header(data)
        check_size(width, height, name)
        if colors in ("CMYK", "YCCK") or (channels == 1 and colors != "Gray"):
            return None
        return simplejpeg.decode_jpeg(data, "GRAY" if channels == 1 else "RGB", **_EXACT_JPEG)
    except ValueError:  # also where libjpeg merely warns: Pillow then tells a truncated file from an odd one
        return None


def _decode_small_png(data: bytes, channels: int) -> np.ndarray | None:
    """Gray 8-bit PNGs, as the digits and MNIST have them, ten times as fast as through Pillow."""
    plain_gray = data[:4] == b"\x89PNG" and data[24:26] == b"\x08\x00" and len(data) < _SMALL_BYTES
    if not plain_gray or b"tRNS" in data or data[28:29] != b"\x00" or not _is_whole_png(data):
        return None
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if pixels is None or pixels.ndim != 2:
        return None
    return np.repeat(pixels[:, :, None], channels, axis=2)


def _is_whole_png(data: bytes) -> bool:
    """Whether all its parts are there and have their checksums; OpenCV would make up what is missing."""
    place = 8
    while place + 12 <= len(data):
        length, kind = struct.unpack(">I4s", data[place : place + 8])
        end = place + 12 + length
        if data[end - 4 : end] != struct.pack(">I", zlib.crc32(data[place + 4 : end - 4])):
            return False
        if kind == b"IEND":
            return True
        place = end
    return False


def _decode_with_pillow(data: bytes, channels: int, name: str) -> np.ndarray:
    with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
        image: Image.Image = opened
        check_size(*image.size, name)
        image.load()
        if image.mode.startswith("I") or image.mode == "F":
            return _from_wide(np.asarray(image), channels, image.mode.startswith("I;16"))
        if image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")  # Pillow warns where transparency is lost on the direct way
        converted = image.convert("L" if channels == 1 else "RGB")
    return np.array(converted).reshape(converted.height, converted.width, channels)


def _from_wide(pixels: np.ndarray, channels: int, is_16_bit: bool) -> np.ndarray:
    """Gray of 16 bits (some files hold it as 32) to 8 bits; Pillow's own conversion would clip at 255."""
    wide = pixels.astype(np.float64)
    scaled = wide / 257 if is_16_bit or wide.max(initial=0) > 255 else wide
    return np.repeat(np.clip(np.round(scaled), 0, 255).astype(np.uint8)[:, :, None], channels, axis=2)


def exif_orientation(data: bytes) -> int:
    """How a camera says the stored pixels are turned, 1 to 8; 1, upright, where nothing readable is said."""
    if data[:2] == b"\xff\xd8" and b"Exif" not in data and b":Orientation" not in data:
        return 1  # most photographs of the web: spares Pillow's look at every marker
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged EXIF data is no reason to refuse the pixels
        return 1
    return orientation if orientation in range(1, 9) else 1


def _oriented(pixels: np.ndarray, data: bytes) -> np.ndarray:
    orientation = exif_orientation(data)
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)
