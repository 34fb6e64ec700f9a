"""Computes which part of an image a crop takes, as torchvision does."""

import math

import numpy as np

Box = tuple[float, float, float, float]  # left, top, right, bottom
TRIES = 10  # to draw a crop that fits, as in torchvision


def random_crop_box(
    height: int, width: int, area_range: tuple[float, ...], aspect_range: tuple[float, ...], draws: np.ndarray
) -> tuple[int, int, int, int]:
    """Draws (top, left, height, width): the first of ten tries that fits, else the largest central crop in range.

    Distributed as in torchvision's RandomResizedCrop. `draws` is float64 [40] in [0, 1).
    """
    low, high = math.log(aspect_range[0]), math.log(aspect_range[1])
    for area, aspect, down, right in draws.reshape(TRIES, 4).tolist():
        target = height * width * (area_range[0] + area * (area_range[1] - area_range[0]))
        ratio = math.exp(low + aspect * (high - low))
        crop_width, crop_height = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top, left = int(down * (height - crop_height + 1)), int(right * (width - crop_width + 1))
            return top, left, crop_height, crop_width
    crop_height, crop_width = height, width
    if width / height < aspect_range[0]:
        crop_height = max(1, round(width / aspect_range[0]))
    elif width / height > aspect_range[1]:
        crop_width = max(1, round(height * aspect_range[1]))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


def resized_size(height: int, width: int, resize_px: int) -> tuple[int, int]:
    """Returns (height, width) after resizing the short side to `resize_px`, rounded as torchvision's Resize does."""
    resized_long = int(resize_px * max(height, width) / min(height, width))
    return (resize_px, resized_long) if height <= width else (resized_long, resize_px)


def center_box(height: int, width: int, resize_px: int, crop_px: int) -> Box:
    """Returns (left, top, right, bottom), in the stored image, of the central crop taken after the resize.

    Rounds as torchvision's Resize and CenterCrop do, so that the crop has their pixels without computing others.
    """
    resized_height, resized_width = resized_size(height, width, resize_px)
    top, left = round((resized_height - crop_px) / 2), round((resized_width - crop_px) / 2)
    down, right = height / resized_height, width / resized_width
    return left * right, top * down, min((left + crop_px) * right, width), min((top + crop_px) * down, height)
