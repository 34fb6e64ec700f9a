"""Image files for tests: good ones of every kind, and crafted ones."""

import io
import struct
import zlib

import numpy as np
from PIL import Image


def encoded(image: Image.Image, kind: str = "PNG", **save) -> bytes:
    """The bytes of an image file."""
    file = io.BytesIO()
    image.save(file, kind, **save)
    return file.getvalue()


def gradient(width: int = 40, height: int = 30) -> Image.Image:
    """A picture without symmetry."""
    rows, columns = np.mgrid[:height, :width]
    pixels = np.stack([rows * 255 // height, columns * 255 // width, (rows * columns) % 256], axis=-1)
    return Image.fromarray(pixels.astype(np.uint8))


def turned(orientation: int, **size) -> bytes:
    """A JPEG that says how it is turned."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(gradient(**size), "JPEG", exif=exif, quality=95, subsampling=0)


def png(width: int, height: int, body: bytes, color_type: int = 2) -> bytes:
    """A PNG that claims a size, whatever its compressed body holds."""

    def part(kind: bytes, content: bytes) -> bytes:
        checked = kind + content
        return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))

    header = struct.pack(">IIBBBBB", width, height, 8, color_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", header) + part(b"IDAT", zlib.compress(body, 9)) + part(b"IEND", b"")


def gif(width: int, height: int, frame: tuple[int, int] = (1, 1)) -> bytes:
    """A GIF that claims a canvas and a first frame of these sizes."""
    head = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
    return head + b"\x2c" + struct.pack("<HHHHB", 0, 0, *frame, 0) + b"\x02\x02\x44\x01\x00\x3b"


def webp(width: int, height: int) -> bytes:
    """An extended WebP that claims a canvas."""
    canvas = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    small = encoded(gradient(), "WEBP")[12:]
    body = b"WEBPVP8X" + struct.pack("<I", 10) + b"\x02\0\0\0" + canvas + small
    return b"RIFF" + struct.pack("<I", len(body)) + body


BOMBS = {
    "png": png(50_000, 50_000, b"\0" * 1_000_000),
    "gray png": png(50_000, 50_000, b"\0" * 100_000, color_type=0),
    "png below OpenCV's own limit": png(30_000, 30_000, b"\0" * 100_000, color_type=0),
    "gif": gif(65_535, 65_535),
    "gif whose frame is larger than its canvas": gif(1, 1, (65_535, 65_535)),
    "webp": webp(2**16, 2**15),
    "bmp": encoded(gradient(), "BMP")[:18] + struct.pack("<ii", 50_000, 50_000) + encoded(gradient(), "BMP")[26:],
    "ppm": b"P6 50000 50000 255\n" + b"\0" * 1000,
}
