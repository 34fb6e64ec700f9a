"""Draws predictions below images."""

import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from densenet_jax.errors import report_write_errors
from densenet_jax.predict.explain import to_rgb
from densenet_jax.predict.files import digest
from densenet_jax.predict.images import ImageLimits, load_image
from densenet_jax.predict.predictor import ClassProbability

_LEAST_PX, _MOST_PX = 320, 1280  # width of annotated images
_QUALITY = 90
_LETTER_PX = 16
_LONGEST_NAME = 240  # bytes; file systems allow 255


def annotation_path(directory: str, path: str, root: str, suffixes: tuple[str, ...] = (".jpg", ".jpeg")) -> str:
    """Maps `path` below `root` to the same place below `directory`, never outside of it.

    The first of `suffixes` is appended to names that end in none of them.
    """
    inside = pathlib.PurePath(os.path.relpath(os.path.abspath(path), root))
    parts = ["__" if part == ".." else part for part in inside.parts]
    name = parts.pop()
    if len(os.fsencode(name)) > _LONGEST_NAME:
        name = f"{name[: _LONGEST_NAME // 8]}-{digest(name).hex()}"
    return os.path.join(directory, *parts, name if name.lower().endswith(suffixes) else f"{name}{suffixes[0]}")


def annotate(path: str, target: str, answers: Sequence[ClassProbability], limits: ImageLimits, **decoding: Any) -> None:
    """Writes the image at `path`, as `load_image` reads it, with a bar for each answer below, as a JPEG to `target`.

    Raises:
        ImageError: the image can no longer be read.
        UserError: `target` can't be written.
    """
    pixels = to_rgb(load_image(path, 0, limits=limits, bits=0, **decoding))
    picture = draw_answers(np.asarray(pixels), answers)
    with report_write_errors(target, "change --annotate"):
        os.makedirs(os.path.dirname(target) or ".", exist_ok=True)
        picture.save(target, "JPEG", quality=_QUALITY)


def draw_answers(pixels: np.ndarray, answers: Sequence[ClassProbability]) -> Image.Image:
    """Draws `answers` below uint8 pixels [h, w, 3], scaled to a legible width."""
    image = Image.fromarray(pixels)
    width = min(max(image.width, _LEAST_PX), _MOST_PX)
    height = min(max(1, round(image.height * width / image.width)), 4 * _MOST_PX)
    smooth = width < image.width or image.width > _LEAST_PX // 4
    image = image.resize((width, height), Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST)
    line_px = round(1.5 * _LETTER_PX)
    picture = Image.new("RGB", (width, height + line_px * len(answers)), "white")
    picture.paste(image)
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(_LETTER_PX)
    for row, answer in enumerate(answers):
        top = height + row * line_px
        draw.rectangle((0, top + 2, round(answer.probability * (width - 1)), top + line_px - 2), fill="#cfe2f3")
        draw.text((6, top + 3), f"{answer.probability:.2f}  {answer.label}", fill="black", font=font)
    return picture
