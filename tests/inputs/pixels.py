"""Image files of every kind that is read, each with the pixels that a correct reader makes of it.

Files are written by Pillow, OpenCV, tifffile and NumPy, or byte by byte; the right pixels follow from the numbers that
were written, by arithmetic that stands here.
"""

import dataclasses
import io
import struct
import zlib
from typing import Any

import cv2
import numpy as np
import tifffile
from PIL import Image, ImageCms

_RANDOM = np.random.default_rng(20)
GRAY = _RANDOM.integers(0, 256, (7, 5), np.uint8)
GRAY[0, :2] = 0, 255
WIDE = _RANDOM.integers(0, 65536, (7, 5), np.uint16)
WIDE[0, :2] = 0, 65535
RGB = _RANDOM.integers(0, 256, (7, 5, 3), np.uint8)
WIDE_RGB = _RANDOM.integers(0, 65536, (7, 5, 3), np.uint16)
ALPHA = _RANDOM.integers(0, 256, (7, 5), np.uint8)
MANY = _RANDOM.integers(0, 256, (7, 5, 6), np.uint8)
FOUR, WIDE_FOUR = MANY[:, :, :4], np.dstack([WIDE_RGB, WIDE])
TWELVE = (WIDE >> 4).astype(np.uint16)  # 0 to 4095


@dataclasses.dataclass(frozen=True)
class Case:
    """One file.

    Attributes:
        data: its bytes.
        want: pixels [h, w] or [h, w, c], uint8 or uint16; or the words with which it is refused.
        channels: config.data.channels.
        pixel_range: config.data.pixel_range.
        within: levels by which a pixel may differ.
    """

    data: bytes
    want: np.ndarray | str
    channels: int = 1
    pixel_range: tuple[float, ...] = ()
    within: int = 0


def pillow(pixels: np.ndarray | Image.Image, kind: str, **save: Any) -> bytes:
    """The bytes of a file that Pillow writes."""
    file = io.BytesIO()
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(file, kind, **save)
    return file.getvalue()


def tiff(pixels: np.ndarray, **write: Any) -> bytes:
    """The bytes of a file that tifffile writes."""
    file = io.BytesIO()
    tifffile.imwrite(file, pixels, **write)
    return file.getvalue()


def npy(pixels: np.ndarray) -> bytes:
    """The bytes of an array file."""
    file = io.BytesIO()
    np.save(file, pixels)
    return file.getvalue()


def opencv(pixels: np.ndarray, ending: str) -> bytes:
    """The bytes of a file that OpenCV writes, of RGB or RGBA."""
    return cv2.imencode(ending, pixels[:, :, [2, 1, 0, 3][: pixels.shape[2]]])[1].tobytes()


def oriented(pixels: np.ndarray, orientation: int, kind: str) -> bytes:
    """A file that says how its pixels are turned."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return pillow(pixels, kind, exif=exif)


def bits_png(pixels: np.ndarray, bits: int) -> bytes:
    """A gray PNG of 1, 2 or 4 bits, which Pillow writes only for black and white."""
    rows = []
    for row in pixels:
        packed = np.unpackbits(row[:, None], axis=1)[:, 8 - bits :].ravel()
        rows.append(b"\0" + np.packbits(packed).tobytes())
    header = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], bits, 0, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(b"".join(rows))), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in parts
    )


def luma(pixels: np.ndarray) -> np.ndarray:
    """Gray of ITU-R 601, in whole numbers."""
    red, green, blue = np.moveaxis(pixels.astype(np.int64), -1, 0)
    return ((19595 * red + 38470 * green + 7471 * blue + 32768) // 65536).astype(pixels.dtype)


def ranged(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """16-bit pixels of values that are black and white at `low` and `high`."""
    shares = (values.astype(np.float64) - low) / (high - low)
    return np.rint(np.clip(shares, 0, 1) * 65535).astype(np.uint16)


def inks(pixels: np.ndarray) -> np.ndarray:
    """RGB of cyan, magenta, yellow and black, each of which takes light away."""
    light = 1 - pixels / np.iinfo(pixels.dtype).max
    return np.rint(light[:, :, :3] * light[:, :, 3:] * np.iinfo(pixels.dtype).max).astype(pixels.dtype)


def _float_with(value: float) -> np.ndarray:
    pixels = (GRAY / 255).astype(np.float32)
    pixels[3, 3] = value
    return pixels


def _palette() -> Image.Image:
    image = Image.fromarray(GRAY % 4, "P")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90, 200, 210, 220])
    return image


def _animation(kind: str) -> bytes:
    frames = [Image.fromarray(RGB), Image.fromarray(255 - RGB)]
    return pillow(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)


_COLORS = np.array([[10, 20, 30], [40, 50, 60], [70, 80, 90], [200, 210, 220]], np.uint8)
_SIGNED = WIDE.astype(np.int32) // 16 - 1000
_PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
_THREE = np.repeat(GRAY[:, :, None], 3, axis=2)
CASES: dict[str, Case] = {
    # Depth of gray.
    "gray_1_bit.png": Case(bits_png(GRAY % 2, 1), GRAY % 2 * np.uint8(255)),
    "gray_2_bit.png": Case(bits_png(GRAY % 4, 2), GRAY % 4 * np.uint8(85)),
    "gray_4_bit.png": Case(bits_png(GRAY % 16, 4), GRAY % 16 * np.uint8(17)),
    "gray_8_bit.png": Case(pillow(GRAY, "PNG"), GRAY),
    "gray_16_bit.png": Case(pillow(WIDE, "PNG"), WIDE),
    "gray_16_bit_as_color.png": Case(pillow(WIDE, "PNG"), np.repeat(WIDE[:, :, None], 3, 2), channels=3),
    "twelve_of_16_bit.png": Case(pillow(TWELVE, "PNG"), TWELVE),
    "twelve_of_16_bit_ranged.png": Case(pillow(TWELVE, "PNG"), ranged(TWELVE, 0, 4095), pixel_range=(0, 4095)),
    "inverted_range.png": Case(pillow(TWELVE, "PNG"), ranged(TWELVE, 4095, 0), pixel_range=(4095, 0)),
    "gray_8_bit_ranged.png": Case(pillow(GRAY, "PNG"), ranged(GRAY, 50, 200), pixel_range=(50, 200)),
    "gray_8_bit.tif": Case(tiff(GRAY), GRAY),
    "gray_16_bit.tif": Case(tiff(WIDE), WIDE),
    "gray_16_bit_big_endian.tif": Case(tiff(WIDE, byteorder=">"), WIDE),
    "gray_16_bit_big_and_big_endian.tif": Case(tiff(WIDE, bigtiff=True, byteorder=">"), WIDE),
    "rgb_8_bit_big_and_big_endian.tif": Case(
        tiff(RGB, bigtiff=True, byteorder=">", photometric="rgb"), RGB, channels=3
    ),
    "gray_16_bit_deflate.tif": Case(tiff(WIDE, compression="zlib", predictor=True), WIDE),
    "gray_16_bit_big.tif": Case(tiff(WIDE, bigtiff=True), WIDE),
    "gray_16_bit_lzw.tif": Case(pillow(WIDE, "TIFF", compression="tiff_lzw"), WIDE),
    "white_is_zero_8_bit.tif": Case(tiff(GRAY, photometric="miniswhite"), 255 - GRAY),
    "white_is_zero_16_bit.tif": Case(tiff(WIDE, photometric="miniswhite"), 65535 - WIDE),
    "gray_32_bit.tif": Case(tiff(WIDE.astype(np.uint32)), "uint32 from 0 to 65535; set config.data.pixel_range"),
    "gray_32_bit_ranged.tif": Case(tiff(WIDE.astype(np.uint32)), WIDE, pixel_range=(0, 65535)),
    "gray_64_bit.tif": Case(tiff(WIDE.astype(np.int64)), "int64 from 0 to 65535; set config.data.pixel_range"),
    "signed_8_bit.tif": Case(tiff(GRAY.view(np.int8)), "int8 from -1.* set config.data.pixel_range"),
    "signed_8_bit_ranged.tif": Case(
        tiff(GRAY.view(np.int8)), ranged(GRAY.view(np.int8), -128, 127), pixel_range=(-128, 127)
    ),
    "signed_16_bit.tif": Case(tiff(_SIGNED.astype(np.int16)), "from -1000 to 3095; set config.data.pixel_range"),
    "signed_16_bit_ranged.tif": Case(
        tiff(_SIGNED.astype(np.int16)), ranged(_SIGNED, -1000, 3000), pixel_range=(-1000, 3000)
    ),
    "gray_32_bit_high_ranged.tif": Case(tiff(WIDE.astype(np.uint32) * 65537), WIDE, pixel_range=(0, 2**32 - 1)),
    "signed_32_bit.tif": Case(pillow(_SIGNED, "TIFF"), "from -1000 to 3095; set config.data.pixel_range"),
    "signed_32_bit_ranged.tif": Case(pillow(_SIGNED, "TIFF"), ranged(_SIGNED, -1000, 3000), pixel_range=(-1000, 3000)),
    "float.tif": Case(tiff((GRAY / 255).astype(np.float32)), ranged(GRAY, 0, 255), within=1),
    "float_half.tif": Case(tiff((GRAY / 255).astype(np.float16)), ranged(GRAY, 0, 255), within=20),
    "float_double.tif": Case(tiff(GRAY / 255), ranged(GRAY, 0, 255), within=1),
    "float_big_endian.tif": Case(tiff((GRAY / 255).astype(np.float32), byteorder=">"), ranged(GRAY, 0, 255), within=1),
    "float_to_255.tif": Case(tiff(GRAY.astype(np.float32)), "float32 from 0 to 255; set config.data.pixel_range"),
    "float_to_255_ranged.tif": Case(tiff(GRAY.astype(np.float32)), ranged(GRAY, 0, 255), pixel_range=(0, 255)),
    "float_below_0.tif": Case(tiff(_float_with(-0.5)), "float32 from -0.5 to 1; set config.data.pixel_range"),
    "nan.tif": Case(tiff(_float_with(np.nan)), "not finite"),
    "nan_ranged.tif": Case(tiff(_float_with(np.nan)), "not finite", pixel_range=(0, 1)),
    "infinite.tif": Case(tiff(_float_with(np.inf)), "not finite"),
    "complex.tif": Case(tiff(GRAY.astype(np.complex64)), "complex64|is no JPEG"),
    "gray_8_bit.pgm": Case(pillow(GRAY, "PPM"), GRAY),
    "gray_15.pgm": Case(b"P2 2 2 15\n0 5 10 15\n", np.array([[0, 85], [170, 255]], np.uint8)),
    "gray_12_bit.pgm": Case(b"P5 5 7 4095\n" + TWELVE.astype(">u2").tobytes(), ranged(TWELVE, 0, 4095), within=1),
    "gray_16_bit.pgm": Case(b"P5 5 7 65535\n" + WIDE.astype(">u2").tobytes(), WIDE),
    "float.pfm": Case(b"Pf\n5 7\n-1.0\n" + (GRAY[::-1] / 255).astype("<f4").tobytes(), ranged(GRAY, 0, 255), within=1),
    # Color.
    "rgb_8_bit.png": Case(pillow(RGB, "PNG"), RGB, channels=3),
    "rgb_8_bit_as_gray.png": Case(pillow(RGB, "PNG"), luma(RGB)),
    "rgb_16_bit.png": Case(opencv(WIDE_RGB, ".png"), WIDE_RGB, channels=3),
    "rgb_16_bit_as_gray.png": Case(opencv(WIDE_RGB, ".png"), luma(WIDE_RGB)),
    "rgb_8_bit.tif": Case(tiff(RGB, photometric="rgb"), RGB, channels=3),
    "rgb_16_bit.tif": Case(tiff(WIDE_RGB, photometric="rgb"), WIDE_RGB, channels=3),
    "rgb_16_bit_planar.tif": Case(
        tiff(np.moveaxis(WIDE_RGB, -1, 0), photometric="rgb", planarconfig="separate"), WIDE_RGB, channels=3
    ),
    "rgb_16_bit_lzw.tif": Case(opencv(WIDE_RGB, ".tif"), WIDE_RGB, channels=3),
    "rgb_float.tif": Case(
        tiff((RGB / 255).astype(np.float32), photometric="rgb"), ranged(RGB, 0, 255), channels=3, within=1
    ),
    "rgb_16_bit.ppm": Case(b"P6 5 7 65535\n" + WIDE_RGB.astype(">u2").tobytes(), WIDE_RGB, channels=3),
    "rgb.bmp": Case(pillow(RGB, "BMP"), RGB, channels=3),
    "rgb.webp": Case(pillow(RGB, "WEBP", lossless=True), RGB, channels=3),
    "lab.tif": Case(pillow(Image.new("LAB", (5, 7)), "TIFF"), "CIE Lab", channels=3),
    "profile_is_ignored.png": Case(pillow(RGB, "PNG", icc_profile=_PROFILE), RGB, channels=3),
    # Alpha and palettes.
    "alpha_is_dropped.png": Case(pillow(np.dstack([RGB, ALPHA]), "PNG"), RGB, channels=3),
    "alpha_16_bit_is_dropped.png": Case(opencv(np.dstack([WIDE_RGB, WIDE]), ".png"), WIDE_RGB, channels=3),
    "alpha_is_the_fourth.png": Case(pillow(np.dstack([RGB, ALPHA]), "PNG"), np.dstack([RGB, ALPHA]), channels=4),
    "alpha_with_gray.png": Case(pillow(Image.fromarray(np.dstack([GRAY, ALPHA]), "LA"), "PNG"), GRAY),
    "alpha_with_gray_kept.png": Case(
        pillow(Image.fromarray(np.dstack([GRAY, ALPHA]), "LA"), "PNG"), np.dstack([GRAY, ALPHA]), channels=2
    ),
    "palette.png": Case(pillow(_palette(), "PNG"), _COLORS[GRAY % 4], channels=3),
    "palette_with_transparency.png": Case(pillow(_palette(), "PNG", transparency=1), _COLORS[GRAY % 4], channels=3),
    "palette.gif": Case(pillow(_palette(), "GIF"), _COLORS[GRAY % 4], channels=3),
    # Several images in a file.
    "animation.webp": Case(_animation("WEBP"), RGB, channels=3),
    "animation.png": Case(_animation("PNG"), RGB, channels=3),
    "two_pages.tif": Case(tiff(np.stack([GRAY, 255 - GRAY]), photometric="minisblack"), GRAY),
    # Orientation: here as stored; test_orientation turns.
    "turned.tif": Case(oriented(GRAY, 6, "TIFF"), GRAY),
    "turned_16_bit.tif": Case(oriented(WIDE, 8, "TIFF"), WIDE),
    "turned.png": Case(oriented(GRAY, 6, "PNG"), GRAY),
    # Other numbers of channels.
    "six_channels.tif": Case(tiff(MANY, photometric="minisblack", planarconfig="contig"), MANY, channels=6),
    "six_planes.tif": Case(
        tiff(np.moveaxis(MANY, -1, 0), photometric="minisblack", planarconfig="separate"), MANY, channels=6
    ),
    "six_pages.tif": Case(tiff(np.moveaxis(MANY, -1, 0), photometric="minisblack"), MANY, channels=6),
    "four_channels.tif": Case(tiff(FOUR, photometric="minisblack", planarconfig="contig"), FOUR, channels=4),
    "four_channels_of_16_bit.tif": Case(
        tiff(WIDE_FOUR, photometric="minisblack", planarconfig="contig"), WIDE_FOUR, channels=4
    ),
    "rgb_and_infrared.tif": Case(tiff(FOUR, photometric="rgb", extrasamples=["unspecified"]), FOUR, channels=4),
    "rgb_and_infrared_as_3.tif": Case(
        tiff(FOUR, photometric="rgb", extrasamples=["unspecified"]), FOUR[:, :, :3], channels=3
    ),
    "rgb_and_infrared_16_bit_as_3.tif": Case(
        tiff(WIDE_FOUR, photometric="rgb", extrasamples=["unspecified"]), WIDE_FOUR[:, :, :3], channels=3
    ),
    "inks_8_bit.tif": Case(tiff(FOUR, photometric="separated"), inks(FOUR), channels=3, within=1),
    "inks_16_bit.tif": Case(tiff(WIDE_FOUR, photometric="separated"), inks(WIDE_FOUR), channels=3),
    "inks_16_bit_as_gray.tif": Case(tiff(WIDE_FOUR, photometric="separated"), luma(inks(WIDE_FOUR))),
    "inks_8_bit_as_4.tif": Case(
        tiff(FOUR, photometric="separated"), "3 channels, config.data.channels is 4", channels=4
    ),
    "inks_16_bit_as_4.tif": Case(
        tiff(WIDE_FOUR, photometric="separated"), "3 channels, config.data.channels is 4", channels=4
    ),
    "six_channels_as_3.tif": Case(
        tiff(MANY, photometric="minisblack", planarconfig="contig"),
        "6 channels, config.data.channels is 3",
        channels=3,
    ),
    "rgb_as_5.png": Case(pillow(RGB, "PNG"), "3 channels, config.data.channels is 5", channels=5),
    "gray.npy": Case(npy(GRAY), GRAY),
    "wide.npy": Case(npy(WIDE), WIDE),
    "wide_big_endian.npy": Case(npy(WIDE.astype(">u2")), WIDE),
    "bool.npy": Case(npy(GRAY > 100), (GRAY > 100).astype(np.uint8) * np.uint8(255)),
    "six_channels.npy": Case(npy(MANY), MANY, channels=6),
    "float_channels.npy": Case(npy((MANY / 255).astype(np.float32)), ranged(MANY, 0, 255), channels=6, within=1),
    "signed.npy": Case(npy(_SIGNED), "int32 from -1000 to 3095; set config.data.pixel_range"),
    "channels_first.npy": Case(npy(np.zeros((3, 70, 90), np.uint8)), r"\(3, 70, 90\), expected \[height", channels=3),
    "objects.npy": Case(npy(np.array([[None]])), "Object arrays|dtype is object"),
    "cut_off.npy": Case(npy(GRAY)[:-5], "reshape|cut|read|EOF"),
    "text.npy": Case(npy(np.array([["a"]])), "its dtype is <U1"),
}
