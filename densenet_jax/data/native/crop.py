"""Calls the compiled helper on numpy arrays; ctypes releases the interpreter lock meanwhile."""

import ctypes
import functools
import math
import os

import cv2
import numpy as np

from densenet_jax.data.crop_boxes import Box
from densenet_jax.data.native.build import build, library_paths
from densenet_jax.data.resize import resize as plain_resize
from densenet_jax.data.resize import vertical_first
from densenet_jax.system.native_build import build_at_first_use

Size = tuple[int, int]  # height and width, or top and left
_SIDE_MARGIN = 160  # pixels beside a part that decoding may overwrite
_EIGHT_PIXELS = 32  # bytes; eight rows are resized horizontally at once
_BITS = 22  # fractional bits of a weight, as in Pillow


class _Taps(ctypes.Structure):
    """The inputs and weights that each output sums; `taps` in crop_decode.c."""

    _fields_ = (
        ("first", ctypes.c_void_p), ("count", ctypes.c_void_p), ("weights", ctypes.c_void_p),
        ("size", ctypes.c_int32), ("out", ctypes.c_int32),
    )  # fmt: skip

    def __init__(self, first: np.ndarray, count: np.ndarray) -> None:
        """Allocates the weights; `first` and `count` are int32 [outputs]."""
        size = int(count.max())
        self._memory = (first, count, np.empty((len(first), size), np.int32))
        super().__init__(*(array.ctypes.data for array in self._memory), size, len(first))


@functools.cache
def _library() -> ctypes.CDLL | None:
    """Loads the compiled helper; None if it was not built, or DENSENET_JAX_NATIVE=0 forbids it."""
    if os.environ.get("DENSENET_JAX_NATIVE") == "0":
        return None
    build_at_first_use("the JPEG helper", library_paths(), build)
    pointer, number, taps = ctypes.c_void_p, ctypes.c_int, ctypes.POINTER(_Taps)
    for path in library_paths():
        try:
            library = ctypes.CDLL(os.fspath(path))
        except OSError:
            continue
        library.decode_part.argtypes = (ctypes.c_char_p, ctypes.c_ulong, pointer, number, number, pointer)
        library.down.argtypes = (pointer, number, number, number, taps, pointer)
        library.across.argtypes = (pointer, number, number, number, taps, pointer, pointer)
        library.weigh.argtypes = (taps, pointer, ctypes.c_double, number)
        library.weigh.restype = None
        return library
    return None


def available() -> bool:
    """Returns whether the compiled helper can be used."""
    return _library() is not None


def decode_part(data: bytes, left: int, top: int, width: int, height: int, *, rgbx: bool = False) -> np.ndarray | None:
    """Decodes a part of a JPEG file to exactly the pixels of the whole image.

    Returns a view, uint8 [height, width, 3], or [height, width, 4] with `rgbx`; None where the helper can't decode the
    file (CMYK, damaged, no JPEG at all).
    """
    library = _library()
    if library is None or min(left, top) < 0 or min(width, height) < 1:
        return None
    lines = np.empty((height, width + _SIDE_MARGIN, 4 if rgbx else 3), np.uint8)
    part = (ctypes.c_int * 4)(left, top, width, height)
    margin = library.decode_part(data, len(data), part, rgbx, lines.strides[0], lines.ctypes.data)
    return None if margin < 0 else lines[:, margin : margin + width]


def resize(
    pixels: np.ndarray, out_px: int, box: Box, *, cubic: bool, whole: Size | None = None, corner: Size = (0, 0)
) -> np.ndarray:
    """Resizes a box of an image to a square with the bytes that Pillow 13 gives: uint8 [out_px, out_px, 3].

    Args:
        pixels: uint8 [height, width, 4], the last channel unused; rows may have gaps. May be the part of the image
            that `window` returns.
        box: (left, top, right, bottom) in the image.
        whole: (height, width) of the image; None where `pixels` is all of it.
        corner: (top, left) of `pixels` in the image.

    Raises:
        ValueError: `pixels` is less than the box needs.
    """
    library = _library()
    assert library is not None, "call available() first"
    height, width = pixels.shape[:2]
    whole = whole or (height, width)
    x = _taps(whole[1], corner[1], box[0], box[2], out_px, cubic)
    y = _taps(whole[0], corner[0], box[1], box[3], out_px, cubic)
    if pixels.dtype != np.uint8 or pixels.shape[2:] != (4,) or pixels.strides[1:] != (4, 1):
        raise ValueError(f"pixels are {pixels.dtype}{list(pixels.shape)}, expected uint8[height, width, 4] in lines")
    full = np.empty((out_px, out_px, 4), np.uint8)
    turned = np.empty((width + out_px) * _EIGHT_PIXELS, np.uint8)
    source, result, work = pixels.ctypes.data, full.ctypes.data, turned.ctypes.data
    if vertical_first(*whole, out_px):
        half = np.empty((out_px, width, 4), np.uint8)
        done = library.down(source, pixels.strides[0], height, 4 * width, y, half.ctypes.data) and library.across(
            half.ctypes.data, half.strides[0], out_px, width, x, result, work
        )
    else:
        half = np.empty((height, out_px, 4), np.uint8)
        done = library.across(source, pixels.strides[0], height, width, x, half.ctypes.data, work) and library.down(
            half.ctypes.data, half.strides[0], height, half.strides[0], y, result
        )
    if not done:
        raise ValueError(f"{width}x{height} pixels from {corner} on are less than resizing {box} looks at")
    return cv2.cvtColor(full, cv2.COLOR_RGBA2RGB)


@functools.lru_cache(maxsize=1024)  # crops have few sizes; 10 kB each
def _taps(size: int, have: int, low: float, high: float, out_px: int, cubic: bool) -> _Taps:
    """Computes the taps of `out_px` outputs evenly spaced between low and high among `size` inputs.

    Only inputs from `have` on are in memory. Computes in Pillow's order, so that weights are equal to the last bit.
    """
    library = _library()
    assert library is not None, "call available() first"
    scale = (high - low) / out_px
    step = 1 / max(scale, 1.0)
    reach = (2 if cubic else 1) / step
    center = low + (np.arange(out_px) + 0.5) * scale
    first = np.maximum((center - reach + 0.5).astype(np.int32), 0)
    count = np.minimum((center + reach + 0.5).astype(np.int32), size) - first
    taps = _Taps(first - have, count)
    center -= have
    library.weigh(taps, center.ctypes.data, step, cubic)
    return taps


def window(low: float, high: float, out_px: int, size: int, *, cubic: bool) -> tuple[int, int]:
    """Returns first and last + 1 of the `size` pixels that resizing low..high to `out_px` reads, with a margin."""
    reach = (2 if cubic else 1) * max((high - low) / out_px, 1) + 2
    return max(0, math.floor(low - reach)), min(size, math.ceil(high + reach))


def crop(
    data: bytes, box: tuple[int, int, int, int], out_px: int, interpolation: str, antialias: bool
) -> np.ndarray | None:
    """Decodes, cuts and resizes with the compiled helper; returns None where it can't."""
    top, left, height, width = box
    pixels = decode_part(data, left, top, width, height, rgbx=antialias)
    if pixels is None:
        return None
    if not antialias:
        return plain_resize(pixels, out_px, out_px, interpolation, False)
    return resize(pixels, out_px, (0.0, 0.0, width, height), cubic=interpolation == "bicubic")


def crop_between(data: bytes, size: Size, box: Box, out_px: int, interpolation: str) -> np.ndarray | None:
    """Resizes a box that may fall between pixels, decoding only what that reads; returns None where it can't."""
    cubic = interpolation == "bicubic"
    single = np.array(box, np.float32)  # Pillow keeps boxes, and subtracts their sides, in single precision
    x0, y0 = single[:2].tolist()
    x1, y1 = x0 + float(single[2] - single[0]), y0 + float(single[3] - single[1])
    left, right = window(x0, x1, out_px, size[1], cubic=cubic)
    top, bottom = window(y0, y1, out_px, size[0], cubic=cubic)
    pixels = decode_part(data, left, top, right - left, bottom - top, rgbx=True)
    if pixels is None:
        return None
    return resize(pixels, out_px, (x0, y0, x1, y1), cubic=cubic, whole=size, corner=(top, left))
