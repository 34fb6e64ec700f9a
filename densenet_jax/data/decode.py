"""Decodes image files at their full bit depth: JPEG by libjpeg-turbo, DICOM by pydicom, most others by Pillow."""

import io
import logging

import cv2
import numpy as np
import simplejpeg
from PIL import Image

from densenet_jax.data import dicom, headers, rare_formats
from densenet_jax.data.pixels import Stored, narrow, stored_array, to_pixels, widen
from densenet_jax.data.records import DamagedImage

logger = logging.getLogger(__name__)
_warned: list[str] = []  # the first image that lost bits
_EXACT_JPEG = {"fastdct": False, "fastupsample": False}  # the pixels that Pillow gives


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
        DamagedImage: the file is truncated, no image, has more than `MAX_PIXELS` pixels, another number of channels, or
            values that mean no brightness.
    """
    try:
        if size := headers.declared_size(data):
            headers.check_size(*size, name)
        pixels = None
        if not channels and data[:2] == b"\xff\xd8":
            channels = 3
        if not pixel_range and channels in (1, 3):
            pixels = _decode_jpeg(data, channels, name) if data[:2] == b"\xff\xd8" else None
            pixels = _decode_small_png(data, channels) if pixels is None else pixels
        if dicom.is_dicom(data):
            headers.image_size(data, name)
            pixels = to_pixels(dicom.decode_dicom(data, dicom_frame, pixel_range), channels, pixel_range)
        if pixels is None:
            pixels = to_pixels(_decode_stored(data, channels, name), channels, pixel_range)
        pixels = with_bits(pixels, bits, name)
        return _oriented(pixels, data) if apply_exif_orientation else pixels
    except DamagedImage:
        raise
    except Exception as error:  # decoders raise nearly anything on garbage
        raise DamagedImage(name, headers.why_not(error)) from error


def with_bits(pixels: np.ndarray, bits: int, name: str) -> np.ndarray:
    """Converts pixels to 8 or 16 bits, or leaves them for 0; warns once where bits are lost."""
    if bits == 16:
        return widen(pixels)
    if bits == 8 and pixels.dtype == np.uint16:
        if not _warned:
            _warned.append(name)
            logger.warning(
                "%s has more than 8 bits, of which 8 are kept; config.data.pixel_range=(0, 65535) keeps 16 of all.",
                name,
            )
        return narrow(pixels)
    return pixels


def _decode_jpeg(data: bytes, channels: int, name: str) -> np.ndarray | None:
    """Decodes with libjpeg-turbo's simple call; returns None where that fails, and Pillow then decides."""
    try:
        height, width, colors, _ = simplejpeg.decode_jpeg_header(data)
        headers.check_size(width, height, name)
        if colors in ("CMYK", "YCCK") or (channels == 1 and colors != "Gray"):
            return None
        return simplejpeg.decode_jpeg(data, "GRAY" if channels == 1 else "RGB", **_EXACT_JPEG)
    except ValueError:  # also on mere warnings: Pillow then distinguishes truncated files from odd ones
        return None


def _decode_small_png(data: bytes, channels: int) -> np.ndarray | None:
    """Decodes gray 8-bit PNGs, such as MNIST, ten times as fast as Pillow; returns None for other files."""
    plain_gray = data[:4] == b"\x89PNG" and data[24:26] == b"\x08\x00" and len(data) < headers.SMALL_BYTES
    if not plain_gray or b"tRNS" in data or data[28:29] != b"\x00" or not headers.is_whole_png(data):
        return None
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if pixels is None or pixels.ndim != 2:
        return None
    return np.repeat(pixels[:, :, None], channels, axis=2)


def _decode_stored(data: bytes, channels: int, name: str) -> Stored:
    """Decodes to the numbers in the file, 8-bit files straight to gray or RGB by Pillow."""
    if data.startswith(rare_formats.NPY_MAGIC):
        (height, width, *_), _ = rare_formats.npy_header(data)
        headers.check_size(width, height, name)
        return stored_array(np.load(io.BytesIO(data), allow_pickle=False))
    if data[:8] == headers.PNG and data[24:26] in (b"\x10\x02", b"\x10\x04", b"\x10\x06"):  # Pillow keeps only 8 bits
        if not headers.is_whole_png(data):
            raise ValueError("the PNG file is damaged or cut off")
        return rare_formats.decode_with_opencv(data)
    if data[:2] == b"P6" and (white := rare_formats.pnm_white(data)) > 255:
        headers.image_size(data, name)
        return rare_formats.decode_ppm(data, white)
    if data.startswith(headers.TIFF):
        data = rare_formats.without_orientation(data)  # Pillow would rotate TIFF alone of all formats
        if (facts := rare_formats.tiff_facts(data)) is not None and rare_formats.pillow_loses(facts, channels):
            headers.check_size(facts.width, facts.height, name)
            return rare_formats.decode_tiff(data)
    return _decode_with_pillow(data, channels, name)


def _decode_with_pillow(data: bytes, channels: int, name: str) -> Stored:
    with Image.open(io.BytesIO(data), formats=headers.FORMATS) as opened:
        image: Image.Image = opened
        headers.check_size(*image.size, name)
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


def _oriented(pixels: np.ndarray, data: bytes) -> np.ndarray:
    orientation = headers.exif_orientation(data)
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)
