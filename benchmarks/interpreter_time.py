"""Measures the time an image holds the interpreter's lock: processor time outside the calls that release it."""

import functools
import io
import time
from collections.abc import Callable

LET_GO: list[float] = []  # seconds of processor time of every call that let go of the lock
PARTS: list[float] = []  # of every part of a batch that a reading thread filled


def held_secs() -> float:
    """Returns and resets the reading threads' processor time outside those calls since `watch`."""
    held = sum(PARTS) - sum(LET_GO)
    PARTS.clear(), LET_GO.clear()
    return held


def _timed(function: Callable, seconds: list[float] = LET_GO) -> Callable:
    @functools.wraps(function)
    def call(*arguments, **keywords):  # type: ignore[no-untyped-def]
        began = time.thread_time()
        try:
            return function(*arguments, **keywords)
        finally:
            seconds.append(time.thread_time() - began)

    return call


class _TimedFile(io.FileIO):
    read = _timed(io.FileIO.read)


def watch() -> None:
    """Starts timing the reading threads, and apart from them the calls that read, decode and resize.

    What these do before they let go, some microseconds, counts as theirs; copies between arrays and the readings of the
    clock (1 microsecond) count as the interpreter's.
    """
    import cv2
    import simplejpeg
    from PIL import Image

    from densenet_jax.data import batches, folder, resize
    from densenet_jax.data.native import crop

    places: list[tuple[object, str]] = [(simplejpeg, "decode_jpeg"), (cv2, "resize"), (cv2, "cvtColor")]
    places.append((Image.Image, "resize"))
    if resize._simd is not None:
        places.append((resize._simd.Resizer, "resize"))
    if (library := crop._library()) is not None:
        places += [(library, "decode_part"), (library, "weigh"), (library, "down"), (library, "across")]
    batches._PartBuilder.__getitem__ = _timed(batches._PartBuilder.__getitem__, PARTS)  # type: ignore[method-assign]
    folder.open = _timed(_TimedFile)  # type: ignore[attr-defined]
    for holder, name in places:
        setattr(holder, name, _timed(getattr(holder, name)))
