"""Which images are meant: files, folders and patterns to paths, always in the same order."""

import glob
import hashlib
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from densenet_jax.data.folder import EXTENSIONS
from densenet_jax.errors import UserError


class Found(NamedTuple):
    """A path that is to be predicted, or in whose place an error is reported: `why`, "" for none."""

    path: str
    why: str = ""


def find_images(places: Sequence[str]) -> Iterator[Found]:
    """The images of `places`, in their order; of each, sorted by name, every path once.

    A file is taken whatever its name. Of a folder the files at any depth are taken whose names end as images' do, but
    no hidden ones; links to folders are not followed. A pattern ("photos/*.jpg", "photos/**/*.png") stands for the
    files and folders that match. What does not exist is found as well, and reading it says so. Only names are held in
    memory: those of one folder at a time, or of one pattern; where paths may repeat, 16 bytes of each besides.
    """
    seen: set[bytes] = set()
    may_repeat = len(places) > 1 or any(map(glob.has_magic, places))
    for place in places:
        for found in _of_place(place):
            if may_repeat:
                if (key := digest(found.path)) in seen:
                    continue
                seen.add(key)
            yield found


def check_places(places: Sequence[str]) -> int:
    """Counts what `find_images` finds.

    Raises:
        UserError: there is nothing at all.
    """
    if not places:
        raise UserError("--mode predict needs --images: a file, a folder or a pattern in quotes; it may be repeated.")
    if not any(os.path.lexists(place) or _matches(place) for place in _without_zeros(places)):
        raise UserError(f"--images {places[0]!r} is no file, folder or pattern that matches one; check the path.")
    count = sum(1 for _ in find_images(places))
    if not count:
        raise UserError(
            f"--images {places[0]!r} holds no images; files that end in {', '.join(EXTENSIONS)} are taken from folders."
        )
    return count


def common_folder(places: Sequence[str]) -> str:
    """The deepest folder that everything of `places` lies in, as an absolute path."""
    folders = []
    for place in map(os.path.abspath, _without_zeros(places)):
        if not os.path.isdir(place):
            place = os.path.dirname(place)
        while glob.has_magic(place) and not os.path.exists(place):
            place = os.path.dirname(place)
        folders.append(place)
    return os.path.commonpath(folders) if folders else os.getcwd()


def digest(name: str) -> bytes:
    """16 bytes that stand for a name, whatever is in it."""
    return hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _without_zeros(places: Sequence[str]) -> list[str]:
    return [place for place in places if "\0" not in place]  # the system's calls take no such name


def _of_place(place: str) -> Iterator[Found]:
    if os.path.isdir(place):
        yield from _of_folder(place)
    elif "\0" in place or os.path.lexists(place) or not glob.has_magic(place):
        yield Found(place)
    else:
        for match in _matches(place):
            yield from _of_folder(match) if os.path.isdir(match) else (Found(match),)


def _matches(place: str) -> list[str]:
    return sorted(glob.iglob(place, recursive=True)) if glob.has_magic(place) else []


def _of_folder(folder: str) -> Iterator[Found]:
    try:
        with os.scandir(folder) as entries:
            names = sorted(
                (entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries if not entry.name.startswith(".")
            )
    except OSError as error:
        yield Found(folder, f"the folder can't be read ({error.strerror or error})")
        return
    for name, is_folder in names:
        path = os.path.join(folder, name)
        if is_folder:
            yield from _of_folder(path)
        elif name.lower().endswith(EXTENSIONS):
            yield Found(path)
