"""Converts stored numbers to pixels: picks black, white and the model's channels."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

MAX_CHANNELS = 64


@dataclasses.dataclass(frozen=True)
class Stored:
    """Numbers as a file holds them, [height, width, channels] of any real type."""

    values: np.ndarray
    white: float | None  # value of white where 0 is black; None where only the user knows
    alpha: bool = False  # whether the last channel is transparency
    negative: bool = False  # whether 0 is white and `white` is black


def stored_array(values: np.ndarray) -> Stored:
    """Wraps an array: integers from 0 to their type's largest and floats from 0 to 1 are black to white.

    Raises:
        ValueError: another shape or type.
    """
    if values.ndim == 2:
        values = values[:, :, None]
    if values.ndim != 3 or not 1 <= values.shape[2] <= MAX_CHANNELS:
        raise ValueError(f"its shape is {values.shape}, expected [height, width] or [height, width, channels]")
    if values.dtype == np.bool_:
        return Stored(values.astype(np.uint8) * np.uint8(255), white=255)
    if values.dtype.kind not in "uif":
        raise ValueError(f"its dtype is {values.dtype}, expected uint8, uint16 or floats in [0, 1]")
    return Stored(values, white=white_of(values.dtype))


def white_of(dtype: np.dtype) -> float | None:
    """Returns the value of white for a type; None for signed and for 32- or 64-bit integers."""
    if dtype.kind == "f":
        return 1.0
    return float(np.iinfo(dtype).max) if dtype.kind == "u" and dtype.itemsize <= 2 else None


def to_pixels(stored: Stored, channels: int, pixel_range: tuple[float, ...] = ()) -> np.ndarray:
    """Converts stored numbers to pixels: uint8 if 8 bits suffice, else uint16; [height, width, channels].

    Args:
        channels: 1 (color is made gray as Pillow does it), 3 (gray is repeated), or as many as there are; 0: those.
        pixel_range: stored values that become black and white; (): those of the type.

    Raises:
        ValueError: the values mean no brightness, or there is another number of channels.
    """
    values, alpha = stored.values, None
    if stored.alpha:
        values, alpha = values[:, :, :-1], values[:, :, -1:]
    pixels = _scale(values, stored.white, pixel_range)
    if stored.negative and not pixel_range:
        pixels = np.iinfo(pixels.dtype).max - pixels
    have = values.shape[2]
    if channels in (0, have):
        return pixels
    if alpha is not None and have + 1 == channels:
        opaque = _scale(alpha, stored.white, ())
        return np.concatenate([pixels, widen(opaque) if pixels.dtype == np.uint16 else opaque], axis=2)
    if have == 1 and channels == 3:
        return np.repeat(pixels, 3, axis=2)
    if have == 3 and channels == 1:
        red, green, blue = (pixels[:, :, channel : channel + 1].astype(np.uint64) for channel in range(3))
        return ((red * 19595 + green * 38470 + blue * 7471 + 32768) >> 16).astype(pixels.dtype)
    raise ValueError(f"it has {have} channels, config.data.channels is {channels}")


def widen(pixels: np.ndarray) -> np.ndarray:
    """Converts 8-bit pixels to 16 bits at equal brightness."""
    return pixels.astype(np.uint16) * 257 if pixels.dtype == np.uint8 else pixels


def narrow(pixels: np.ndarray) -> np.ndarray:
    """Rounds 16-bit pixels to 8 bits at equal brightness."""
    return ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8) if pixels.dtype == np.uint16 else pixels


def to_picture(pixels: np.ndarray) -> np.ndarray:
    """Converts pixels for display: 8 bits, and the mean of the channels as gray unless there are 1 or 3."""
    if pixels.dtype == np.uint16:
        pixels = (pixels >> 8).astype(np.uint8)
    return pixels if pixels.shape[-1] in (1, 3) else pixels.mean(axis=-1, keepdims=True).astype(pixels.dtype)


def join(images: Sequence[np.ndarray], joined: Callable[[Sequence[np.ndarray]], np.ndarray] = np.stack) -> np.ndarray:
    """Stacks (or concatenates) pixels of 8 and 16 bits; the result has 16 if any has."""
    wide = any(image.dtype == np.uint16 for image in images)
    return joined([widen(image) for image in images] if wide else images)


def _scale(values: np.ndarray, white: float | None, pixel_range: tuple[float, ...]) -> np.ndarray:
    if not pixel_range and values.dtype == np.uint8 and white == 255:
        return values
    if not pixel_range and values.dtype == np.uint16 and white == 65535:
        return values.astype(np.uint16)  # in native byte order
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise ValueError("it has pixels that are not finite numbers")
    low, high = (float(number(values)) if values.size else 0.0 for number in (np.min, np.max))
    if pixel_range:
        black, top = pixel_range
    elif white is None or low < 0 or high > white:
        raise ValueError(
            f"its pixels are {values.dtype} from {low:g} to {high:g}; set config.data.pixel_range to the two numbers "
            "that are black and white"
        )
    else:
        black, top = 0.0, white
    shares = (values.astype(np.float64) - black) / (top - black)
    return np.rint(np.clip(shares, 0.0, 1.0) * 65535).astype(np.uint16)
