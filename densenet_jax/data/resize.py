"""Resizes pixels: exactly as Pillow, closely and faster, or without antialiasing."""

import contextlib
from typing import Any

import cv2
import numpy as np
from PIL import Image

from densenet_jax.data.crop_boxes import Box

_simd: Any = None
with contextlib.suppress(ImportError):  # there is no wheel for Linux on ARM
    import cykooz_resizer

    _simd = cykooz_resizer

PILLOW = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
_TRIANGLE = _simd and _simd.ResizeOptions(_simd.ResizeAlg.convolution(_simd.FilterType.bilinear))
_OPENCV = {"bilinear": cv2.INTER_LINEAR, "bicubic": cv2.INTER_CUBIC}


def resize(
    pixels: np.ndarray, height: int, width: int, interpolation: str, antialias: bool, box: Box | None = None
) -> np.ndarray:
    """Resizes `pixels`, or the part of it in `box` (left, top, right, bottom; may fall between pixels).

    `pixels` and the result are uint8 or uint16 [height, width, channels]; `interpolation` is "bilinear" or "bicubic".
    With `antialias`, which averages over all pixels that an output pixel covers, the values are those of Pillow's
    resize.
    """
    if pixels.shape[:2] == (height, width) and box in (None, (0, 0, width, height)):
        return pixels
    channels = pixels.shape[2]

    def scale(image: np.ndarray) -> np.ndarray:  # of 8 bits with 1 or 3 channels, or one channel of single precision
        if not antialias and box is None:
            return cv2.resize(image, (width, height), interpolation=_OPENCV[interpolation])
        return np.asarray(Image.fromarray(image).resize((width, height), PILLOW[interpolation], box))

    if channels in (1, 3) and pixels.dtype == np.uint8:
        return scale(pixels[:, :, 0] if channels == 1 else pixels).reshape(height, width, channels)
    exact = np.stack([scale(pixels[:, :, channel].astype(np.float32)) for channel in range(channels)], axis=2)
    return np.clip(np.rint(exact), 0, np.iinfo(pixels.dtype).max).astype(pixels.dtype)


def resize_closely(pixels: np.ndarray, out_px: int, interpolation: str) -> np.ndarray:
    """Resizes [height, width, channels] to a square, antialiased, within one level of Pillow.

    Uses Pillow itself where cykooz_resizer is not installed, for bicubic (where cykooz strays two levels), and for
    other than 1 or 3 channels of 8 bits.
    """
    is_usual = pixels.dtype == np.uint8 and pixels.shape[2] in (1, 3)
    if _simd is None or interpolation != "bilinear" or pixels.shape[:2] == (out_px, out_px) or not is_usual:
        return resize(pixels, out_px, out_px, interpolation, True)
    height, width, channels = pixels.shape
    kind = _simd.PixelType.U8 if channels == 1 else _simd.PixelType.U8x3
    # Two calls: one call orders the passes differently from Pillow and rounds once; sixty times as many values differ.
    half = (width, out_px) if vertical_first(height, width, out_px) else (out_px, height)
    before = _simd.ImageData(width, height, kind, pixels.tobytes())
    between, after = _simd.ImageData(*half, kind), _simd.ImageData(out_px, out_px, kind)
    resizer = _simd.Resizer()
    resizer.resize(before, between, _TRIANGLE)
    resizer.resize(between, after, _TRIANGLE)
    return np.frombuffer(after.get_buffer(), np.uint8).reshape(out_px, out_px, channels)


def vertical_first(height: int, width: int, out_px: int) -> bool:
    """Returns whether Pillow resizes vertically first: for images that lose much more height than width."""
    return height > out_px and height - out_px > 2 * (width - out_px)
