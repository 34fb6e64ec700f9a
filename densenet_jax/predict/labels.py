"""Names of classes: a user's labels.txt, and ImageNet's."""

import functools
import os
import pathlib
import re
from collections.abc import Sequence

from densenet_jax.errors import UserError

_IMAGENET = pathlib.Path(__file__).with_name("imagenet_labels.txt")
_MAX_BYTES = 16 * 2**20


@functools.cache
def imagenet_labels() -> tuple[str, ...]:
    """A short name for each of ImageNet-1k's classes, in the order of the published weights: 281 is "tabby"."""
    return read_labels(_IMAGENET)


def read_labels(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """A class name a line, from class 0 on; empty lines and comments ("# ...") are passed over.

    Raises:
        UserError: the file can't be read or holds no names.
    """
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(_MAX_BYTES)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{os.fspath(path)} can't be read as labels ({error}); expected a class name a line."
        ) from error
    lines = (line.strip() for line in text.split("\n"))
    names = tuple(line for line in lines if line and line != "#" and not line.startswith("# "))
    if not names:
        raise UserError(f"{os.fspath(path)} holds no labels; expected a class name a line, from class 0 on.")
    return names


def check_count(names: Sequence[str], num_classes: int, where: str) -> None:
    """Checks that there is a name for each class.

    Raises:
        UserError: there isn't.
    """
    if len(names) != num_classes:
        raise UserError(
            f"{where} has {len(names)} labels, but the model has {num_classes} classes; give a file with one a class."
        )


def readable(names: tuple[str, ...]) -> tuple[str, ...]:
    """The same names, or ImageNet's words where they are its 1,000 WordNet ids (n01440764, ...)."""
    ids = len(names) == 1000 and list(names) == sorted(names) and all(re.fullmatch(r"n\d{8}", name) for name in names)
    return imagenet_labels() if ids else names
