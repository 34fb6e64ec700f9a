"""Class names: a user's label file, or ImageNet's."""

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
    """Returns a short name for each ImageNet-1k class, in the order of the published weights (281 is "tabby")."""
    return read_labels(_IMAGENET)


def read_labels(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """Reads one class name a line, starting with class 0; skips empty lines and comments ("# ...").

    Raises:
        UserError: the file can't be read or holds no names.
    """
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(_MAX_BYTES)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{os.fspath(path)} can't be read as labels ({error}); expected one class name a line."
        ) from error
    lines = (line.strip() for line in text.split("\n"))
    names = tuple(line for line in lines if line and line != "#" and not line.startswith("# "))
    if not names:
        raise UserError(f"{os.fspath(path)} holds no labels; expected one class name a line, starting with class 0.")
    return names


def check_count(names: Sequence[str], num_classes: int, where: str) -> None:
    """Checks that there is one name for each class.

    Raises:
        UserError: the counts differ.
    """
    if len(names) != num_classes:
        raise UserError(
            f"{where} has {len(names)} labels, but the model has {num_classes} classes; give one label a class."
        )


def make_readable(names: tuple[str, ...]) -> tuple[str, ...]:
    """Replaces ImageNet's 1,000 WordNet ids (n01440764, ...) with words; returns other names as they are."""
    ids = len(names) == 1000 and list(names) == sorted(names) and all(re.fullmatch(r"n\d{8}", name) for name in names)
    return imagenet_labels() if ids else names
