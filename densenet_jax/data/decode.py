"""Decodes image files at their full bit depth: JPEG by libjpeg-turbo, DICOM by pydicom, most others by Pillow."""

import io
import logging
import struct
import zlib

import cv2
import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from densenet_jax.data import dicom, rare_formats
from densenet_jax.data.pixels import Stored, narrow, to_pixels, widen
from densenet_jax.errors import UserError, first_line

logger = logging.getLogger(__name__)
MAX_PIXELS = 80_000_000  # larger images are refused before allocating memory; ImageNet's largest has 32 million
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM", "TIFF")  # Pillow supports more, some of which start programs
HEAD_BYTES = dicom.HEAD_BYTES  # of a file, that tell its kind
_ORIENTATION = 0x0112  # the EXIF tag
_SMALL_BYTES = 4096
_EXACT_JPEG = {"fastdct": False, "fastupsample": False}  # the pixels that Pillow gives
_PNG = b"\x89PNG\r\n\x1a\n"
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


class DamagedImage(UserError):  # noqa: N818  (what it is, in the data set's words)
    """An image that can't be read or decoded; the message names it and says why."""

    def __init__(self, name: str, why: str) -> None:
        super().__init__(f"Image {name} can't be decoded: {why}.")
        self.name = name
        self.why = why


def decode_image(
    data: bytes,
    channels: int = 3,
    *,
    name: str = "image",
    apply_exif_orientation: bool = False,
    pixel_range: tuple[float, ...] = (),
    bits: int = 8,
    dicom_frame: int = 0,
) -> np.ndarray:
    """Decodes an image file, or its first frame or page. docs/data.md has a table of every kind.

    Args:
        data: a JPEG, PNG, WebP, GIF, BMP, PPM, TIFF, NPY or DICOM file.
        channels: 3 for RGB, 1 for gray, else the number that the file has; 0 takes any. Alpha is dropped and palettes
            are looked up.
        name: the image's name in messages.
        apply_exif_orientation: off for data sets: the published ImageNet weights were trained and evaluated on pixels
            as they are stored.
        pixel_range: stored values that become black and white; (): those of the file's own type.
        bits: bit depth of the result: 8, 16, or 0 for 16 where the file has more than 8.
        dicom_frame: see `densenet_jax.data.dicom.decode_dicom`.

    Returns:
        uint8 or uint16 [height, width, channels].

    Raises:
        DamagedImage: the file is truncated, no image, has more than `MAX_PIXELS` pixels, another number of channels,
            or values that mean no brightness.
    """
    try:
        if size := declared_size(data):
            check_size(*size, name)
        pixels = None
        if not channels and data[:2] == b"\xff\xd8":
            channels = 3
        if not pixel_range and channels in (1, 3):
            pixels = _decode_jpeg(data, channels, name) if data[:2] == b"\xff\xd8" else None
            pixels = _decode_small_png(data, channels) if pixels is None else pixels
        if dicom.is_dicom(data):
            image_size(data, name)
            pixels = to_pixels(dicom.decode_dicom(data, dicom_frame, pixel_range), channels, pixel_range)
        if pixels is None:
            pixels = to_pixels(_decode_stored(data, channels, name), channels, pixel_range)
        pixels = with_bits(pixels, bits, name)
        return _oriented(pixels, data) if apply_exif_orientation else pixels
    except DamagedImage:
        raise
    except Exception as error:  # decoders raise nearly anything on garbage
        raise DamagedImage(name, _reason(error)) from error


def with_bits(pixels: np.ndarray, bits: int, name: str) -> np.ndarray:
    """Converts pixels to 8 or 16 bits, or leaves them for 0; warns once where bits are lost."""
    if bits == 16:
        return widen(pixels)
    if bits == 8 and pixels.dtype == np.uint16:
        _warn_of_lost_bits(name)
        return narrow(pixels)
    return pixels


_warned: list[str] = []


def _warn_of_lost_bits(name: str) -> None:
    if not _warned:
        _warned.append(name)
        logger.warning(
            "%s has more than 8 bits, of which 8 are kept; config.data.pixel_range=(0, 65535) keeps 16 of all.", name
        )


def is_image_start(head: bytes) -> bool:
    """Returns whether a file that begins with these `HEAD_BYTES` bytes is an image of a supported kind."""
    if dicom.is_dicom(head):
        return True
    if head[:2] == b"BM":  # a text may begin so too; the second header's size decides
        return head[14:18] in (bytes((size, 0, 0, 0)) for size in (12, 40, 52, 56, 64, 108, 124))
    if head[:1] == b"P":
        return head[1:2] in b"123456f" and head[2:3] in (b" ", b"\n", b"\r", b"\t")
    starts = (b"\xff\xd8\xff", _PNG, b"GIF87a", b"GIF89a", rare_formats.NPY_MAGIC, *_TIFF)
    return head.startswith(starts) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return f"it is no {', '.join(FORMATS)}, NPY or DICOM image"
    return first_line(error).rstrip(".")


def check_size(width: int, height: int, name: str) -> None:
    """Raises DamagedImage where an image of this size is too large or empty."""
    if width < 1 or height < 1 or width * height > MAX_PIXELS:
        raise DamagedImage(name, f"it claims {width}x{height} pixels, at most {MAX_PIXELS} are decoded")


def image_size(data: bytes, name: str = "image") -> tuple[int, int]:
    """Reads (width, height) from the file's first bytes; decodes nothing.

    Raises:
        DamagedImage: it is no image, or too large.
    """
    if size := jpeg_size(data, name):
        return size[1], size[0]
    if size := declared_size(data):
        check_size(*size, name)
        if data[:8] == _PNG and data[12:16] == b"IHDR" and len(data) < _SMALL_BYTES and _is_whole_png(data):
            return size  # takes Pillow longer than decoding
    try:
        if dicom.is_dicom(data):
            width, height = dicom.read_size(data)
        elif data.startswith(rare_formats.NPY_MAGIC):
            width, height = rare_formats.npy_size(data)
        else:
            try:
                if data.startswith(rare_formats.BIG_ENDIAN_BIG_TIFF):
                    raise UnidentifiedImageError  # Pillow warns of damage
                with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                    width, height = image.size
            except UnidentifiedImageError:
                if not data.startswith(_TIFF) or (facts := rare_formats.tiff_facts(data)) is None:
                    raise
                width, height = facts.width, facts.height
    except Exception as error:
        raise DamagedImage(name, _reason(error)) from error
    check_size(width, height, name)
    return width, height


def declared_size(data: bytes) -> tuple[int, int] | None:
    """Reads (width, height) of a PNG, WebP or GIF from its first bytes; None for other files.

    Pillow checks sizes too, but for WebP only after allocating the whole canvas.
    """
    if data[:8] == _PNG and len(data) >= 24:
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
    """Reads (height, width) from the file's first bytes; None where it is no JPEG.

    Raises:
        DamagedImage: the image is too large.
    """
    if data[:2] != b"\xff\xd8":
        return None
    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    check_size(width, height, name)
    return height, width


def has_wide_pixels(data: bytes) -> bool:
    """Returns whether a file has more than 8 bits per channel, by its first bytes."""
    if data[:8] == _PNG:
        return data[24:25] == b"\x10"
    if data.startswith(rare_formats.NPY_MAGIC):
        return rare_formats.npy_bits(data) > 8
    if dicom.is_dicom(data):
        return dicom.has_wide_pixels(data)
    if data[:2] in (b"P5", b"P6", b"P2", b"P3", b"Pf"):
        return rare_formats.pnm_white(data) > 255
    facts = rare_formats.tiff_facts(data) if data.startswith(_TIFF) else None
    return facts is not None and facts.bits > 8


def _decode_jpeg(data: bytes, channels: int, name: str) -> np.ndarray | None:
    """Decodes with libjpeg-turbo's simple call; returns None where that fails, and Pillow then decides."""
    try:
        height, width, colors, _ = simplejpeg.decode_jpeg_header(data)
        check_size(width, height, name)
        if colors in ("CMYK", "YCCK") or (channels == 1 and colors != "Gray"):
            return None
        return simplejpeg.decode_jpeg(data, "GRAY" if channels == 1 else "RGB", **_EXACT_JPEG)
    except ValueError:  # also on mere warnings: Pillow then distinguishes truncated files from odd ones
        return None


def _decode_small_png(data: bytes, channels: int) -> np.ndarray | None:
    """Decodes gray 8-bit PNGs, such as MNIST, ten times as fast as Pillow; returns None for other files."""
    plain_gray = data[:4] == b"\x89PNG" and data[24:26] == b"\x08\x00" and len(data) < _SMALL_BYTES
    if not plain_gray or b"tRNS" in data or data[28:29] != b"\x00" or not _is_whole_png(data):
        return None
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if pixels is None or pixels.ndim != 2:
        return None
    return np.repeat(pixels[:, :, None], channels, axis=2)


def _is_whole_png(data: bytes) -> bool:
    """Returns whether all chunks are there with right checksums; OpenCV would invent missing pixels."""
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


def _decode_stored(data: bytes, channels: int, name: str) -> Stored:
    """Decodes to the numbers in the file, 8-bit files straight to gray or RGB by Pillow."""
    if data.startswith(rare_formats.NPY_MAGIC):
        check_size(*rare_formats.npy_size(data), name)
        return rare_formats.decode_npy(data)
    if data[:8] == _PNG and data[24:26] in (b"\x10\x02", b"\x10\x04", b"\x10\x06"):  # Pillow keeps only 8 bits
        if not _is_whole_png(data):
            raise ValueError("the PNG file is damaged or cut off")
        return rare_formats.decode_with_opencv(data)
    if data[:2] == b"P6" and (white := rare_formats.pnm_white(data)) > 255:
        image_size(data, name)
        return rare_formats.decode_ppm(data, white)
    if data.startswith(_TIFF):
        data = rare_formats.without_orientation(data)  # Pillow would rotate TIFF alone of all formats
        if (facts := rare_formats.tiff_facts(data)) is not None and rare_formats.pillow_loses(facts, channels):
            check_size(facts.width, facts.height, name)
            return rare_formats.decode_tiff(data)
    return _decode_with_pillow(data, channels, name)


def _decode_with_pillow(data: bytes, channels: int, name: str) -> Stored:
    with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
        image: Image.Image = opened
        check_size(*image.size, name)
        image.load()
        if image.mode.startswith("I") or image.mode == "F":
            return rare_formats.from_wide_mode(image)
        if image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")  # Pillow warns where transparency is lost on the direct way
        if channels in (1, 3):
            image = image.convert("L" if channels == 1 else "RGB")
        elif image.mode not in ("L", "LA", "RGB", "RGBA"):
            image = image.convert("L" if image.mode == "1" else "RGB")
        values = np.array(image).reshape(image.height, image.width, -1)
        return Stored(values, white=255, alpha=image.mode in ("LA", "RGBA"))


def exif_orientation(data: bytes) -> int:
    """Reads the EXIF orientation, 1 to 8; 1 (upright) where it is missing or unreadable."""
    if data[:2] == b"\xff\xd8" and b"Exif" not in data and b":Orientation" not in data:
        return 1  # most photographs on the web: skips parsing every marker
    if data[:8] == _PNG and not any(kind in data for kind in (b"eXIf", b"iTXt", b"tEXt", b"zTXt")):
        return 1  # Pillow would decode all of it to look for these behind the pixels
    if data.startswith(_TIFF):
        return rare_formats.tiff_orientation(data)
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
