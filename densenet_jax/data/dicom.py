"""Reads DICOM files with pydicom: rescaled, windowed, black as zero. Needs the extra `dicom`."""

import io
import logging
import struct
import warnings
import zlib
from typing import Any

import numpy as np

from densenet_jax.data.pixels import MAX_CHANNELS, Stored

_MAGIC, _MAGIC_PLACE = b"DICM", 128
HEAD_BYTES = _MAGIC_PLACE + len(_MAGIC)  # a file's first bytes that tell whether it is DICOM
_DEFLATED = "1.2.840.10008.1.2.1.99"
_MAX_INFLATED_BYTES = 2**29
_LONG_KINDS = (b"OB", b"OW", b"OF", b"SQ", b"UT", b"UN")  # whose lengths have four bytes
_RANGES = ("RescaleSlope", "ModalityLUTSequence", "WindowWidth", "VOILUTSequence")  # make gray of more than 8 bits
_FACTS = ("Rows", "Columns", "BitsStored", *_RANGES)
# Packages with decoders, by a word of the transfer syntax's name.
_DECODERS = {"JPEG-LS": "pyjpegls", "JPEG 2000": "pylibjpeg-openjpeg", "JPEG": "pylibjpeg pylibjpeg-libjpeg"}


def is_dicom(data: bytes) -> bool:
    """Returns whether a file that begins so is DICOM."""
    return data[_MAGIC_PLACE:HEAD_BYTES] == _MAGIC


def read_size(data: bytes) -> tuple[int, int]:
    """Reads width and height; decodes nothing.

    Raises:
        ValueError: pydicom is missing, or the file has no image.
    """
    dataset = _read(data, only=True)
    return int(dataset.Columns), int(dataset.Rows)


def has_wide_pixels(data: bytes) -> bool:
    """Returns whether an image has more than 8 bits a channel, also of a range that rescaling or a window makes."""
    try:
        dataset = _read(data, only=True)
        return int(dataset.get("BitsStored") or 8) > 8 or any(dataset.get(key) is not None for key in _RANGES)
    except Exception:  # pydicom raises nearly anything on garbage; decoding reports it
        return False


def decode_dicom(data: bytes, frame: int = 0, pixel_range: tuple[float, ...] = ()) -> Stored:
    """Decodes one image: of a file with several frames number `frame`, from 1 on; 0 refuses such a file.

    Monochrome numbers are rescaled (modality), then the file's first window or lookup table (VOI) makes its range
    black to white; with `pixel_range` the rescaled numbers are kept instead. MONOCHROME1 is inverted.

    Raises:
        ValueError: pydicom or a decoder is missing, the file is damaged, or there is no such frame.
    """
    from pydicom.pixels import apply_color_lut, pixel_array

    dataset = _read(data)
    frames = int(dataset.get("NumberOfFrames") or 1)
    if frames > 1 and not 1 <= frame <= frames:
        chosen = f"config.data.dicom_frame is {frame}" if frame else "choose one from 1 on by config.data.dicom_frame"
        raise ValueError(f"it has {frames} frames; {chosen}")
    _check_decoder(dataset)
    values = np.asarray(pixel_array(dataset, index=frame - 1 if frames > 1 else 0))
    kind, bits = str(dataset.get("PhotometricInterpretation", "")), int(dataset.get("BitsStored") or 8)
    if kind == "PALETTE COLOR":
        values = apply_color_lut(values, dataset)
        bits = 8 * values.dtype.itemsize
    if values.ndim == 3:
        if values.shape[2] > MAX_CHANNELS:
            raise ValueError(f"its shape is {values.shape}")
        return Stored(values, white=2.0**bits - 1)
    return _monochrome(values[:, :, None], dataset, bits, kind == "MONOCHROME1", pixel_range)


def _monochrome(
    values: np.ndarray, dataset: Any, bits: int, is_negative: bool, pixel_range: tuple[float, ...]
) -> Stored:
    stored, white = values, None if values.dtype.kind == "i" else 2.0**bits - 1
    if tables := dataset.get("ModalityLUTSequence"):
        values, white = _look_up(values, tables[0], dataset)
        stored = values
    elif slope := dataset.get("RescaleSlope"):
        values = values * float(slope) + float(dataset.get("RescaleIntercept") or 0)
    if pixel_range:
        values = values.astype(np.float64)
        return Stored(sum(pixel_range) - values if is_negative else values, white=None)
    if tables := dataset.get("VOILUTSequence"):
        return Stored(*_look_up(values, tables[0], dataset), negative=is_negative)
    if dataset.get("WindowWidth") is not None and dataset.get("WindowCenter") is not None:
        return Stored(_window(values.astype(np.float64), dataset), white=1.0, negative=is_negative)
    # Without a window the whole range of the stored numbers is shown, where its ends are known.
    return Stored(values if white is None else stored, white=white, negative=is_negative)


def _look_up(values: np.ndarray, item: Any, dataset: Any) -> tuple[np.ndarray, float]:
    """Applies a lookup table (PS3.3, C.11.1.1); pydicom's own wraps indices of tables of 8 bits.

    Returns:
        The numbers, and the largest that a table of its bits can have.
    """
    count, first, bits = (int(number) for number in item.LUTDescriptor)
    data = item.LUTData
    if isinstance(data, bytes):
        order = "<" if dataset.original_encoding[1] else ">"
        data = np.frombuffer(data, np.uint8 if len(data) == count else f"{order}u2")
    table = np.asarray(data, np.int64)
    if len(table) < (count or 2**16):
        raise ValueError(f"its lookup table has {len(table)} of {count or 2**16} entries")
    places = np.clip(np.rint(values).astype(np.int64) - first, 0, (count or 2**16) - 1)
    return table[places], 2.0**bits - 1


def _window(values: np.ndarray, dataset: Any) -> np.ndarray:
    """Maps the first window to 0 to 1 (PS3.3, C.11.2.1)."""
    center, width = (_first(dataset.get(key)) for key in ("WindowCenter", "WindowWidth"))
    function = str(dataset.get("VOILUTFunction") or "LINEAR")
    if not width > 0 or (function == "LINEAR" and width < 1):
        raise ValueError(f"its window has the width {width:g}")
    if function == "SIGMOID":
        return 1 / (1 + np.exp(np.clip(-4 * (values - center) / width, -700, 700)))
    if function == "LINEAR":
        center, width = center - 0.5, max(width - 1, 1e-9)
    return np.clip((values - center) / width + 0.5, 0, 1)


def _first(value: Any) -> float:
    return float(value if isinstance(value, str | float | int) else value[0])


def _read(data: bytes, only: bool = False) -> Any:
    """Reads the data set, with `only` no more than the facts."""
    try:
        import pydicom
        from pydicom import config as behavior
    except ImportError as error:
        raise ValueError("it is DICOM, which needs one more package: `pip install pydicom==3.0.2`") from error
    warnings.filterwarnings("ignore", module="pydicom")
    logging.getLogger("pydicom").setLevel(logging.CRITICAL)
    behavior.settings.reading_validation_mode = behavior.IGNORE
    _check_inflated(data)
    file = io.BytesIO(data)
    dataset = (
        pydicom.dcmread(file, stop_before_pixels=True, specific_tags=list(_FACTS)) if only else pydicom.dcmread(file)
    )
    if not dataset.get("Rows") or not dataset.get("Columns"):
        raise ValueError("it is DICOM without an image")
    if not hasattr(dataset.file_meta, "TransferSyntaxUID"):
        raise ValueError("it doesn't name its transfer syntax")
    return dataset


def _check_inflated(data: bytes) -> None:
    """Checks the size of a deflated file, which pydicom would inflate whole."""
    syntax, place = "", HEAD_BYTES
    while data[place : place + 2] == b"\2\0":  # the elements of the file's meta information
        is_syntax, is_long = data[place + 2 : place + 4] == b"\x10\0", data[place + 4 : place + 6] in _LONG_KINDS
        (size,) = struct.unpack_from("<I" if is_long else "<H", data, place + (8 if is_long else 6))
        start = place + (12 if is_long else 8)
        place = start + size
        syntax = data[start:place].rstrip(b"\0 ").decode("ascii", "replace") if is_syntax else syntax
    if syntax != _DEFLATED:
        return
    inflate, total, part = zlib.decompressobj(-zlib.MAX_WBITS), 0, data[place:]
    while part and not inflate.eof:
        total += len(inflate.decompress(part, 2**20))
        part = inflate.unconsumed_tail
        if total > _MAX_INFLATED_BYTES:
            raise ValueError("it is deflated and too large")


def _check_decoder(dataset: Any) -> None:
    from pydicom.pixels import get_decoder

    syntax = dataset.file_meta.TransferSyntaxUID
    try:
        is_available = get_decoder(syntax).is_available
    except NotImplementedError:
        is_available = False
    if not is_available:
        package = next((name for word, name in _DECODERS.items() if word in syntax.name), "")
        remedy = f"`pip install {package}` reads it" if package else "convert it"
        raise ValueError(f"it is compressed as {syntax.name}, for which there is no decoder; {remedy}")
