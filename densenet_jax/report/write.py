"""Writes a page and its pictures into a work directory atomically."""

import os
import re
from collections.abc import Iterable, Mapping

from densenet_jax.errors import UserError
from densenet_jax.report.page import Picture

DIRECTORY = "report"
_NUMBERED = re.compile(r"(mistake|augmented)_\d+\.png")  # the next page may have fewer of these


def write_page(
    workdir: str, name: str, page: str, pictures: Iterable[Picture], tables: Mapping[str, bytes] = {}
) -> str:
    """Writes `workdir/report/NAME`, its pictures as PNG files and `tables` beside it, and returns the page's path.

    The page embeds its pictures and is replaced in one step, so a reader sees the old page or the new one.

    Raises:
        UserError: the directory can't be written to.
    """
    directory = os.path.join(workdir, DIRECTORY)
    files = {file: content for picture in pictures for file, content in picture.files().items()}
    try:
        os.makedirs(directory, exist_ok=True)
        for file, content in {**files, **tables, name: page.encode("utf-8")}.items():
            _replace(os.path.join(directory, file), content)
        if name == "index.html":
            for file in os.listdir(directory):
                if _NUMBERED.fullmatch(file) and file not in files:
                    os.remove(os.path.join(directory, file))
    except OSError as error:
        raise UserError(
            f"the report can't be written into {directory} ({error.strerror}); fix that, then run --mode report."
        ) from error
    return os.path.join(directory, name)


def _replace(path: str, content: bytes) -> None:
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)
