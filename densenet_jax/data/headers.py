"""Reads what the first bytes of an image file say: its kind, size, depth and orientation."""

import io
import struct
import zlib

import simplejpeg
from PIL import Image, UnidentifiedImageError

from densenet_jax.data import dicom, rare_formats
from densenet_jax.data.records import DamagedImage
from densenet_jax.errors import first_line

MAX_PIXELS = 80_000_000  # larger images are refused before allocating memory; ImageNet's largest has 32 million
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM", "TIFF")  # Pillow supports more, some of which start programs
HEAD_BYTES = dicom.HEAD_BYTES  # of a file, that tell its kind
SMALL_BYTES = 4096
PNG = b"\x89PNG\r\n\x1a\n"
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_ORIENTATION = 0x0112  # the EXIF tag


def is_image_start(head: bytes) -> bool:
    """Returns whether a file that begins with these `HEAD_BYTES` bytes is an image of a supported kind."""
    if dicom.is_dicom(head):
        return True
    if head[:2] == b"BM":  # a text may begin so too; the second header's size decides
        return head[14:18] in (bytes((size, 0, 0, 0)) for size in (12, 40, 52, 56, 64, 108, 124))
    if head[:1] == b"P":
        return head[1:2] in b"123456f" and head[2:3] in (b" ", b"\n", b"\r", b"\t")
    starts = (b"\xff\xd8\xff", PNG, b"GIF87a", b"GIF89a", rare_formats.NPY_MAGIC, *TIFF)
    return head.startswith(starts) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")


def why_not(error: Exception) -> str:
    """Returns why a file can't be read, by the error that a library raised."""
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
        if data[:8] == PNG and data[12:16] == b"IHDR" and len(data) < SMALL_BYTES and is_whole_png(data):
            return size  # takes Pillow longer than decoding
    try:
        if dicom.is_dicom(data):
            width, height = dicom.read_size(data)
        elif data.startswith(rare_formats.NPY_MAGIC):
            (height, width, *_), _ = rare_formats.npy_header(data)
        else:
            try:
                if data.startswith(rare_formats.BIG_ENDIAN_BIG_TIFF):
                    raise UnidentifiedImageError  # Pillow warns of damage
                with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                    width, height = image.size
            except UnidentifiedImageError:
                if not data.startswith(TIFF) or (facts := rare_formats.tiff_facts(data)) is None:
                    raise
                width, height = facts.width, facts.height
    except Exception as error:
        raise DamagedImage(name, why_not(error)) from error
    check_size(width, height, name)
    return width, height


def declared_size(data: bytes) -> tuple[int, int] | None:
    """Reads (width, height) of a PNG, WebP or GIF from its first bytes; None for other files.

    Pillow checks sizes too, but for WebP only after allocating the whole canvas.
    """
    if data[:8] == PNG and len(data) >= 24:
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
    if data[:8] == PNG:
        return data[24:25] == b"\x10"
    if data.startswith(rare_formats.NPY_MAGIC):
        return rare_formats.npy_header(data)[1].itemsize > 1
    if dicom.is_dicom(data):
        return dicom.has_wide_pixels(data)
    if data[:2] in (b"P5", b"P6", b"P2", b"P3", b"Pf"):
        return rare_formats.pnm_white(data) > 255
    facts = rare_formats.tiff_facts(data) if data.startswith(TIFF) else None
    return facts is not None and facts.bits > 8


def is_whole_png(data: bytes) -> bool:
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


def exif_orientation(data: bytes) -> int:
    """Reads the EXIF orientation, 1 to 8; 1 (upright) where it is missing or unreadable."""
    if data[:2] == b"\xff\xd8" and b"Exif" not in data and b":Orientation" not in data:
        return 1  # most photographs on the web: skips parsing every marker
    if data[:8] == PNG and not any(kind in data for kind in (b"eXIf", b"iTXt", b"tEXt", b"zTXt")):
        return 1  # Pillow would decode all of it to look for these behind the pixels
    if data.startswith(TIFF):
        return rare_formats.tiff_orientation(data)
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged EXIF data is no reason to refuse the pixels
        return 1
    return orientation if orientation in range(1, 9) else 1
