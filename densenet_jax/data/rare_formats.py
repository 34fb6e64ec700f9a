"""Reads files of more than 8 bits or of other than 1 or 3 channels: NPY, TIFF, PNM, and 16-bit color PNG."""

import contextlib
import dataclasses
import io
import re
import struct
from collections.abc import Iterator
from typing import Any

import cv2
import numpy as np
from PIL import Image

from densenet_jax.data.pixels import MAX_CHANNELS, Stored, stored_array, white_of

NPY_MAGIC = b"\x93NUMPY"
BIG_ENDIAN_BIG_TIFF = b"MM\0+"  # which Pillow does not read
_UNSIGNED, _SIGNED, _FLOAT = 1, 2, 3  # TIFF's sample formats
_RGB, _CMYK, _CIE_LAB, _PLANES = 2, 5, 8, 2  # photometric interpretations and a planar configuration
_WHOLE_NUMBERS = {1: "B", 3: "H", 4: "I", 16: "Q"}  # TIFF's types; an orientation should be of the second
_ORIENTATION, _XMP_ORIENTATION = 0x0112, b"tiff:Orientation"
_MAX_VALUES = 320_000_000  # values decoded at most: four channels of the largest image
_PNM_NUMBERS = rb"P[2356f]" + 3 * rb"\s+(?:#[^\n]*\n\s*)*(-?[\d.]+)" + rb"\s"


def npy_header(data: bytes) -> tuple[tuple[int, ...], np.dtype]:
    """Reads shape, [height, width] or [height, width, channels], and dtype of an NPY file.

    Raises:
        ValueError: it is damaged or has another shape.
    """
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    if len(shape) not in (2, 3) or (len(shape) == 3 and not 1 <= shape[2] <= MAX_CHANNELS):
        raise ValueError(f"its shape is {shape}, expected [height, width] or [height, width, channels]")
    return shape, dtype


def pnm_white(data: bytes) -> int:
    """Reads the largest value that a PGM or PPM file declares; 65535 for floats (PFM)."""
    if data[:2] == b"Pf":
        return 65535
    numbers = re.match(_PNM_NUMBERS, data[:1024])
    return int(numbers[3]) if numbers else 255


def decode_ppm(data: bytes, white: int) -> Stored:
    """Reads 16-bit RGB, which Pillow would cut to 8.

    Raises:
        ValueError: it is cut off.
    """
    numbers = re.match(_PNM_NUMBERS, data[:1024])
    assert numbers is not None
    width, height = int(numbers[1]), int(numbers[2])
    values = np.frombuffer(data, ">u2", width * height * 3, numbers.end())
    return Stored(values.reshape(height, width, 3).astype(np.uint16), white=white)


def decode_with_opencv(data: bytes) -> Stored:
    """Reads PNG or TIFF of up to four channels as they are stored.

    Raises:
        ValueError: OpenCV can't.
    """
    values = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if values is None:
        raise ValueError("it is damaged or of a kind that is not read")
    values = values.reshape(*values.shape[:2], -1)
    alpha = values.shape[2] == 4
    if values.shape[2] >= 3:
        values = values[:, :, [2, 1, 0, 3][: values.shape[2]]]
    return Stored(values, white_of(values.dtype), alpha=alpha)


def from_wide_mode(image: Image.Image) -> Stored:
    """Wraps a loaded image of Pillow's modes I, I;16 and F, which have one channel."""
    tags: Any = getattr(image, "tag_v2", {})
    values = np.asarray(image)
    bits = (tags.get(258) or (0,))[0]
    if image.mode.startswith("I;16"):
        white: float | None = 2**bits - 1 if 8 < bits < 16 else 65535
        values = values.astype(np.uint16)
    elif image.mode == "F":
        white = 1.0
    else:  # PNM files, which Pillow scales to 16 bits, and TIFF files of signed or 32-bit numbers
        white = 65535 if image.format == "PPM" else None
    return Stored(values[:, :, None], white, negative=tags.get(262) == 0)


@dataclasses.dataclass(frozen=True)
class TiffFacts:
    """The first page of a TIFF file, with `bits` per sample, and the count of pages (at most 65)."""

    width: int
    height: int
    samples: int
    bits: int
    sample_format: int
    photometric: int
    has_alpha: bool
    is_big_endian_big_tiff: bool
    pages: int


def tiff_facts(data: bytes) -> TiffFacts | None:
    """Reads the tags of a TIFF file; returns None where it is damaged."""
    import tifffile

    try:
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            page: Any = file.pages[0]
            bits = page.bitspersample
            return TiffFacts(
                width=int(page.imagewidth),
                height=int(page.imagelength),
                samples=int(page.samplesperpixel),
                bits=max(bits) if isinstance(bits, tuple) else int(bits),
                sample_format=int(page.sampleformat or _UNSIGNED),
                photometric=int(page.photometric),
                has_alpha=any(kind in (1, 2) for kind in page.extrasamples),
                is_big_endian_big_tiff=data.startswith(BIG_ENDIAN_BIG_TIFF),
                pages=_count_pages(data),
            )
    except Exception:  # tifffile raises nearly anything on garbage; Pillow may still read it
        return None


def pillow_loses(facts: TiffFacts, channels: int) -> bool:
    """Returns whether Pillow would lose bits or channels of a TIFF file, or not read it at all."""
    return (
        facts.is_big_endian_big_tiff
        or (channels not in (0, 1, 3) and facts.samples == 1 and facts.pages == channels)
        or facts.samples not in (1, 3, 4)
        or facts.photometric == _CIE_LAB
        or (facts.samples == 4 and facts.photometric not in (_RGB, _CMYK))
        or (facts.samples == channels == 4 and facts.photometric == _RGB and not facts.has_alpha)
        or (facts.sample_format == _SIGNED and facts.bits == 8)
        or (facts.sample_format == _FLOAT and facts.bits != 32)
        or (facts.sample_format == _UNSIGNED and facts.bits == 32)  # Pillow makes large ones negative
        or facts.bits > (32 if facts.samples == 1 else 8)
    )


def decode_tiff(data: bytes) -> Stored:
    """Reads what Pillow can't: wide color, many channels or pages as channels, signed bytes, halves and doubles.

    Raises:
        ValueError: it is damaged, compressed in a way that is not read, or has another shape or type.
    """
    import tifffile

    with tifffile.TiffFile(io.BytesIO(data)) as file:
        pages: list[Any] = [file.pages[0]]
        page, samples = pages[0], int(pages[0].samplesperpixel)
        if samples == 1 and 1 < (count := _count_pages(data)) <= MAX_CHANNELS:
            pages += [file.pages[number] for number in range(1, count)]
        if int(page.photometric) == _CIE_LAB:
            raise ValueError("its colors are CIE Lab; save it as RGB")
        if samples > MAX_CHANNELS or sum(one.size for one in pages) > _MAX_VALUES:
            sides = ", ".join(sorted({f"{one.imagewidth}x{one.imagelength}" for one in pages})[:3])
            raise ValueError(f"it has {samples * len(pages)} channels of {sides} pixels, which is too much")
        try:
            layers = [one.asarray() for one in pages]
        except ValueError:
            if len(pages) > 1:
                raise
            return decode_with_opencv(data)  # supports more compressions
        if len({layer.shape for layer in layers}) > 1:
            raise ValueError("its pages are of different sizes")
        values = layers[0] if len(layers) == 1 else np.stack(layers, axis=-1)
        if values.ndim == 3 and len(layers) == 1 and int(page.planarconfig) == _PLANES:
            values = np.moveaxis(values, 0, -1)
        stored = stored_array(values)
        if int(page.photometric) == _CMYK and samples == 4:
            return _convert_cmyk(stored)
        alpha = len(page.extrasamples) == 1 and samples in (2, 4)
        return dataclasses.replace(stored, alpha=alpha, negative=int(page.photometric) == 0)


def _convert_cmyk(inks: Stored) -> Stored:
    """Converts inks [height, width, 4] to RGB as Pillow does for 8 bits."""
    if inks.white is None:
        raise ValueError(f"its inks are {inks.values.dtype}; save it as RGB")
    light = inks.white - inks.values.astype(np.float64)
    rgb = light[:, :, :3] * light[:, :, 3:] / inks.white
    return dataclasses.replace(
        inks, values=rgb if inks.values.dtype.kind == "f" else np.rint(rgb).astype(inks.values.dtype)
    )


def _directories(data: bytes) -> Iterator[tuple[range, int]]:
    """Finds the directory of each page of a TIFF file: its entries' offsets, and where a value lies in an entry.

    Stops after one page more than the most channels, for a hostile file can link its pages in a circle.
    """
    big = 43 in data[2:4]
    pointer, number, size, value, place = ("Q", "Q", 20, 12, 8) if big else ("I", "H", 12, 8, 4)
    with contextlib.suppress(struct.error, OverflowError):
        for _ in range(MAX_CHANNELS + 1):
            (start,) = struct.unpack_from(_byte_order(data) + pointer, data, place)
            if not start:
                break
            (count,) = struct.unpack_from(_byte_order(data) + number, data, start)
            first = start + struct.calcsize(f"={number}")
            place = first + size * count
            yield range(first, first + size * min(count, 4096), size), value


def _count_pages(data: bytes) -> int:
    return sum(1 for _ in _directories(data))


def _byte_order(data: bytes) -> str:
    return "<" if data[:2] == b"II" else ">"


def _orientation_entry(data: bytes) -> tuple[int, int] | None:
    """Finds the orientation in a TIFF file's first directory: offsets of its entry and of the value."""
    entries, value = next(_directories(data), (range(0), 0))
    with contextlib.suppress(struct.error):
        for entry in entries:
            if struct.unpack_from(_byte_order(data) + "H", data, entry) == (_ORIENTATION,):
                struct.unpack_from("8s", data, entry + value - 4)  # all of it is there
                return entry, entry + value
    return None


def tiff_orientation(data: bytes) -> int:
    """Reads the orientation of a TIFF file, 1 to 8: of its tag, else of its XMP text, as Pillow does."""
    if (place := _orientation_entry(data)) is None:
        text = re.search(_XMP_ORIENTATION + rb'(?:="|>)([1-8])', data)
        return int(text[1]) if text else 1
    entry, value = place
    order, orientation = _byte_order(data), 1
    with contextlib.suppress(struct.error, OverflowError):
        (kind,) = struct.unpack_from(order + "H", data, entry + 2)
        if kind == 16 and 43 not in data[2:4]:  # eight bytes have no room in an entry of a small file
            (value,) = struct.unpack_from(order + "I", data, value)
        (orientation,) = struct.unpack_from(order + _WHOLE_NUMBERS.get(kind, ""), data, value) or (1,)
    return orientation if orientation in range(1, 9) else 1


def without_orientation(data: bytes) -> bytes:
    """Sets the orientation of a TIFF file to upright, so that decoders leave the pixels as they are stored."""
    if (place := _orientation_entry(data)) is None:
        return data.replace(_XMP_ORIENTATION, _XMP_ORIENTATION.lower())
    (entry, value), order, upright = place, _byte_order(data), bytearray(data)
    struct.pack_into(order + "HH" + ("Q" if 43 in data[2:4] else "I"), upright, entry, _ORIENTATION, 3, 1)
    struct.pack_into(order + "H", upright, value, 1)
    return bytes(upright)
