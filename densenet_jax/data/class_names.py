"""Orders class folders, and reads and writes the file of class names."""

import collections
import json
import os
import re
from collections.abc import Iterable, Sequence

from densenet_jax.errors import UserError

LABELS_FILE = "labels.txt"  # in a work directory
_MAX_LABELS_CHARACTERS = 16 * 2**20
# The first line of a file that quotes some names. Older versions take it for a comment; files without it have plain
# names.
_QUOTING_HEADER = '# Lines that begin with " are JSON strings.'


def read_labels(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """Reads one class name per line, from class 0 on; empty lines and comments ("# ...") are skipped.

    Raises:
        UserError: the file can't be read or holds no names.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read(_MAX_LABELS_CHARACTERS + 1)
        if len(text) > _MAX_LABELS_CHARACTERS:
            raise ValueError(f"it has more than {_MAX_LABELS_CHARACTERS:,} characters")
        quoted = text.split("\n", 1)[0].strip() == _QUOTING_HEADER
        lines = [line.strip() for line in text.split("\n")]
        lines = [line for line in lines if line and line != "#" and not line.startswith("# ")]
        names = tuple(_unquote(line) if quoted and line.startswith('"') else line for line in lines)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{os.fspath(path)} can't be read as labels ({error}); expected a class name a line."
        ) from error
    if not names:
        raise UserError(f"{os.fspath(path)} holds no labels; expected a class name a line, from class 0 on.")
    return names


def _unquote(line: str) -> str:
    name = json.loads(line)
    if not isinstance(name, str):
        raise ValueError(f"{line[:40]} is no JSON string")
    name.encode()  # a lone surrogate is no text
    return name


def format_labels(names: Sequence[str]) -> str:
    """Writes names as `read_labels` reads them: one per line, quoted where a plain line would change them."""
    if not any(_needs_quotes(name) for name in names):
        return "".join(f"{name}\n" for name in names)
    lines = (json.dumps(name) if _needs_quotes(name) or name.startswith('"') else name for name in names)
    return "\n".join([_QUOTING_HEADER, *lines]) + "\n"


def _needs_quotes(name: str) -> bool:
    return name != name.strip() or name.startswith(("#", "\ufeff")) or not name.isprintable()


def natural_key(name: str) -> tuple[tuple[str | int, ...], str]:
    """Sorts "class 2" before "Class 10": numbers by value and letters without case, as timm sorts class folders."""
    parts = re.split(r"(\d+)", name.lower())
    return tuple(int(part) if place % 2 else part for place, part in enumerate(parts)), name


def order_classes(classes: Iterable[str], class_order: str) -> tuple[str, ...]:
    """Orders classes by number.

    `class_order` is "text" (by code point), "natural" (see `natural_key`) or a file with one name per line.

    Raises:
        UserError: the file can't be read, has a name twice, or lacks a class.
    """
    if class_order in ("text", "natural"):
        return tuple(sorted(classes, key=natural_key if class_order == "natural" else None))
    names = read_labels(class_order)
    if twice := sorted(name for name, count in collections.Counter(names).items() if count > 1):
        raise UserError(f"config.data.class_order {class_order} has a name twice: {', '.join(twice[:5])}.")
    if missing := sorted(set(classes) - set(names)):
        raise UserError(
            f"config.data.class_order {class_order} lacks {len(missing)} classes: {', '.join(missing[:5])}; "
            "add a line for each."
        )
    return names


def orders_differ(folders: Sequence[str]) -> bool:
    """Returns whether text order and natural order number these classes differently."""
    return order_classes(folders, "text") != order_classes(folders, "natural")
