"""Expands files, folders and patterns to image paths, always in the same order."""

import collections
import glob
import hashlib
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np

from densenet_jax.data.folder_index import EXTENSIONS, is_image_file, report_skipped
from densenet_jax.errors import UserError

Skipped: TypeAlias = "collections.Counter[str] | None"  # counts files that are no images, by their ending


class Candidate(NamedTuple):
    """A path to predict; if `why` is not empty, report that error for it instead."""

    path: str
    why: str = ""
    pixels: np.ndarray | None = None  # once it is preprocessed


def find_images(places: Sequence[str], skipped: Skipped = None) -> Iterator[Candidate]:
    """Yields the images of `places` in order, sorted by name within each place, every path once.

    A file is taken whatever its name. A folder stands for the images at any depth, recognized by their endings or else
    by their first bytes, without hidden ones; links to folders are not followed. A pattern ("photos/*.jpg",
    "photos/**/*.png") stands for the matching files and folders. A path that does not exist is yielded too, so that
    reading it reports the error. Memory holds the names of one folder or pattern, and 16 bytes for each path that may
    repeat.
    """
    seen: set[bytes] = set()
    may_repeat = len(places) > 1 or any(map(glob.has_magic, places))
    for place in places:
        for candidate in _list_place(place, skipped):
            if may_repeat:
                if (key := digest(candidate.path)) in seen:
                    continue
                seen.add(key)
            yield candidate


def check_places(places: Sequence[str]) -> int:
    """Counts the images that `find_images` yields.

    Raises:
        UserError: there are none.
    """
    if not places:
        raise UserError("--mode predict needs --images: a file, a folder or a quoted pattern (repeatable).")
    if not any(os.path.lexists(place) or _expand_pattern(place) for place in _drop_invalid(places)):
        raise UserError(f"--images {places[0]!r} matches no file or folder; check the path.")
    skipped: collections.Counter[str] = collections.Counter()
    count = sum(1 for _ in find_images(places, skipped))
    report_skipped(f"--images {places[0]}", skipped)
    if not count:
        raise UserError(f"--images {places[0]!r} holds no images; check the path.")
    return count


def common_folder(places: Sequence[str]) -> str:
    """Returns the absolute path of the deepest folder that contains all `places`."""
    folders = []
    for place in map(os.path.abspath, _drop_invalid(places)):
        if not os.path.isdir(place):
            place = os.path.dirname(place)
        while glob.has_magic(place) and not os.path.exists(place):
            place = os.path.dirname(place)
        folders.append(place)
    return os.path.commonpath(folders) if folders else os.getcwd()


def digest(name: str) -> bytes:
    """Returns a 16-byte hash of a name, which may hold any characters."""
    return hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _drop_invalid(places: Sequence[str]) -> list[str]:
    return [place for place in places if "\0" not in place]  # system calls reject a zero byte


def _list_place(place: str, skipped: Skipped = None) -> Iterator[Candidate]:
    if os.path.isdir(place):
        yield from _list_folder(place, skipped)
    elif "\0" in place or os.path.lexists(place) or not glob.has_magic(place):
        yield Candidate(place)
    else:
        for match in _expand_pattern(place):
            yield from _list_folder(match, skipped) if os.path.isdir(match) else (Candidate(match),)


def _expand_pattern(place: str) -> list[str]:
    return sorted(glob.iglob(place, recursive=True)) if glob.has_magic(place) else []


def _list_folder(folder: str, skipped: Skipped = None) -> Iterator[Candidate]:
    try:
        with os.scandir(folder) as entries:
            visible = (entry for entry in entries if not entry.name.startswith("."))
            names = sorted((one.name, one.is_dir(follow_symlinks=False), is_image_file(one)) for one in visible)
    except OSError as error:
        yield Candidate(folder, f"the folder can't be read ({error.strerror or error})")
        return
    for name, is_folder, is_image in names:
        path = os.path.join(folder, name)
        if is_folder:
            yield from _list_folder(path, skipped)
        elif is_image or name.lower().endswith(EXTENSIONS):  # other things than files are rejected when read
            yield Candidate(path)
        elif skipped is not None:
            skipped[os.path.splitext(name)[1].lower() or "no ending"] += 1
