"""Summarizes a data set's contents and reading speed, in numbers and pictures."""

import contextlib
import dataclasses
import itertools
import time

import numpy as np

from densenet_jax.data.batches import Batches
from densenet_jax.data.decode import decode_image
from densenet_jax.data.headers import exif_orientation, has_wide_pixels, image_size
from densenet_jax.data.records import DamagedImage, Source
from densenet_jax.data.sampler import spread

_LOOKED_AT = 32  # images whose bit depth is checked before reading
_SAMPLE = 2000  # images whose size is checked; spread evenly over the split


@dataclasses.dataclass(frozen=True)
class SplitSummary:
    """Figures of a split; sizes are of a sample of images spread evenly over it."""

    examples: int
    class_counts: np.ndarray  # int64 [classes]; with many labels the images that have each
    widths: np.ndarray  # int64 [sample], in pixels
    heights: np.ndarray  # int64 [sample], in pixels
    encoded_bytes: np.ndarray  # int64 [sample], sizes of the files
    damaged: tuple[str, ...]  # names in the sample whose size can't be read
    unknown: np.ndarray | None = None  # int64 [labels], images where a label is unknown; None without many labels
    together: np.ndarray | None = None  # int64 [labels, labels], images with both of two labels; None likewise
    groups: int = 0  # number of groups; 0 without groups


def summarize(source: Source, sample: int = _SAMPLE) -> SplitSummary:
    """Counts all labels and reads the headers of up to `sample` images; decodes none."""
    total = len(source)
    sizes, damaged = [], []
    for index in spread(total, sample):
        try:
            record = source[index]
            width, height = image_size(record.image, record.name)
        except DamagedImage as error:
            damaged.append(error.name)
            continue
        sizes.append((width, height, len(record.image)))
    labels, groups = source.labels(), source.groups()
    unknown = together = None
    if source.many_labels:
        present = (labels == 1).astype(np.float32)  # of which BLAS makes exact sums up to 16 million images
        unknown, together = np.isnan(labels).sum(axis=0), (present.T @ present).astype(np.int64)
    counts, group_count = count_labels(labels, source.num_classes), 0 if groups is None else len(np.unique(groups))
    widths, heights, file_sizes = np.array(sizes, np.int64).reshape(-1, 3).T
    return SplitSummary(
        total, counts, widths, heights, file_sizes, tuple(damaged), unknown, together, groups=group_count
    )


def count_labels(labels: np.ndarray, count: int) -> np.ndarray:
    """Counts the examples of each class, integers [n], negative where unknown, or of each label: int64 [count].

    Labels are floats [n, count] of 1, 0 and NaN.
    """
    if labels.ndim == 2:
        return (labels == 1).sum(axis=0, dtype=np.int64)
    return np.bincount(labels[labels >= 0].astype(np.int64), minlength=count)


def look_at_pixels(source: Source, sample: int = _LOOKED_AT) -> tuple[int, dict[str, str]]:
    """Checks up to `sample` images, spread evenly over the split.

    Returns the bit depth to carry (16 where an image has more than 8, else 8), and warnings of what is easily misread,
    by kind.
    """
    wide, turned, brightest = 0, 0, list[int]()
    places = spread(len(source), sample)
    for index in places:
        with contextlib.suppress(DamagedImage, ValueError):  # training reports damaged files
            record = source[index]
            turned += exif_orientation(record.image) != 1
            if has_wide_pixels(record.image):
                wide += 1
                brightest.append(int(decode_image(record.image, 0, name=record.name, bits=16).max(initial=0)))
    warnings = {}
    if brightest and (highest := max(brightest)) < 65536 // 16:
        warnings["dark"] = (
            f"{wide} of {len(places)} sampled images have 16 bits and no value above {highest} of 65535: they are "
            f"almost black; config.data.pixel_range=(0, {max(highest, 1)}) makes the brightest white."
        )
    if turned:
        warnings["turned"] = (
            f"{turned} of {len(places)} sampled images have an EXIF orientation, which training and evaluation ignore "
            "and prediction follows; config.data.exif_orientation=True turns all of them."
        )
    return (16 if wide else 8), warnings


def measure_speed(batches: Batches, seconds: float = 5.0, warmup_batches: int = 2) -> float:
    """Measures images per second of `batches` in this process with nothing else computing; closes `batches`."""
    with batches:
        for _ in itertools.islice(batches, warmup_batches):
            pass
        began, images = time.perf_counter(), 0
        for batch in batches:
            images += len(batch["label"])
            if time.perf_counter() - began >= seconds:
                break
        return images / (time.perf_counter() - began)
