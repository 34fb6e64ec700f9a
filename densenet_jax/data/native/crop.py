"""The compiled helper's calls, with numpy arrays for memory. ctypes lets go of the interpreter while they run."""

import ctypes
import functools
import math
import os

import numpy as np

from densenet_jax.data.native.build import library_paths

_SIDE_MARGIN = 160  # pixels beside a part that decoding may write as well
_TAP_BYTES = 4
_LINES = 4  # that are resized across at the same time


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The compiled helper; None where it was not built, or DENSENET_JAX_NATIVE=0 forbids it."""
    if os.environ.get("DENSENET_JAX_NATIVE") == "0":
        return None
    for path in library_paths():
        try:
            library = ctypes.CDLL(os.fspath(path))
        except OSError:
            continue
        library.resize_rgbx.restype = None
        return library
    return None


def available() -> bool:
    """Whether the compiled helper is there."""
    return _library() is not None


def decode_part(data: bytes, left: int, top: int, width: int, height: int, *, rgbx: bool = False) -> np.ndarray | None:
    """The pixels of a part of a JPEG file, the same as of the whole image decoded.

    Returns:
        uint8[height, width, 3], or [height, width, 4] with `rgbx`, a view; None where the file is of a kind that
        the helper leaves to others (CMYK, damaged, no JPEG at all).
    """
    library = _library()
    if library is None or min(left, top) < 0 or min(width, height) < 1:
        return None
    lines = np.empty((height, width + _SIDE_MARGIN, 4 if rgbx else 3), np.uint8)
    part = (ctypes.c_int * 4)(left, top, width, height)
    margin = library.decode_part(
        data, ctypes.c_ulong(len(data)), part, int(rgbx), lines.strides[0], ctypes.c_void_p(lines.ctypes.data)
    )
    return None if margin < 0 else lines[:, margin : margin + width]


def resize(
    pixels: np.ndarray,
    out_px: int,
    box: tuple[float, float, float, float],
    *,
    cubic: bool,
    whole: tuple[int, int] | None = None,
    corner: tuple[int, int] = (0, 0),
) -> np.ndarray:
    """Resizes a box of an image to a square with the bytes that Pillow 13 gives.

    Args:
        pixels: uint8[height, width, 4], the last channel meaning nothing; lines may lie apart. May be a part of the
            image: what `window` says suffices.
        out_px: side of the result.
        box: (left, top, right, bottom) in the image.
        cubic: bicubic instead of bilinear.
        whole: (height, width) of the image; None where `pixels` is all of it.
        corner: (top, left) of `pixels` in the image.

    Returns:
        uint8[out_px, out_px, 3].
    """
    library = _library()
    assert library is not None, "call available() first"
    height, width = pixels.shape[:2]
    most = [int(4 * max((high - low) / out_px, 1)) + 1 for low, high in ((box[0], box[2]), (box[1], box[3]))]
    taps = _TAP_BYTES * out_px * (4 + sum(most))
    turned = 4 * _LINES * (width + out_px)
    work = np.empty(taps + turned + 4 * out_px * (max(height, width) + out_px), np.uint8)
    result = np.empty((out_px, out_px, 3), np.uint8)
    whole = whole or (height, width)
    library.resize_rgbx(
        ctypes.c_void_p(pixels.ctypes.data), pixels.strides[0], (ctypes.c_int * 2)(whole[1], whole[0]),
        (ctypes.c_int * 4)(corner[1], corner[0], width, height), (ctypes.c_double * 4)(*box), out_px, int(cubic),
        int(_vertical_first(*whole, out_px)), ctypes.c_void_p(result.ctypes.data), ctypes.c_void_p(work.ctypes.data),
    )  # fmt: skip
    return result


def _vertical_first(height: int, width: int, out_px: int) -> bool:
    """Pillow's rule for images of which much more is lost in height than in width: that pass comes first."""
    return height > out_px and height - out_px > 2 * (width - out_px)


def window(low: float, high: float, out_px: int, size: int, *, cubic: bool) -> tuple[int, int]:
    """First and last + 1 of the `size` pixels that resizing low..high to `out_px` looks at, and a few more."""
    reach = (2 if cubic else 1) * max((high - low) / out_px, 1) + 2
    return max(0, math.floor(low - reach)), min(size, math.ceil(high + reach))
