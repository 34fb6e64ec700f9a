"""Class names: a user's label file, or ImageNet's."""

import functools
import pathlib
import re
from collections.abc import Sequence

from densenet_jax.data.class_names import read_labels
from densenet_jax.errors import UserError

_IMAGENET = pathlib.Path(__file__).with_name("imagenet_labels.txt")


@functools.cache
def imagenet_labels() -> tuple[str, ...]:
    """Returns a short name for each ImageNet-1k class, in the order of the published weights (281 is "tabby")."""
    return read_labels(_IMAGENET)


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
