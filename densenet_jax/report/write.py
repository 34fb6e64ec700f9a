"""Writes a page and its pictures into a work directory atomically."""

import os
import re
from collections.abc import Iterable, Mapping

from densenet_jax.errors import report_write_errors
from densenet_jax.report.page import Picture
from densenet_jax.system.disk import replace_file

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
    with report_write_errors(f"the report in {directory}", "fix that, then run --mode report"):
        os.makedirs(directory, exist_ok=True)
        for file, content in {**files, **tables, name: page.encode("utf-8")}.items():
            with replace_file(os.path.join(directory, file)) as stream:
                stream.write(content)
        if name == "index.html":
            for file in os.listdir(directory):
                if _NUMBERED.fullmatch(file) and file not in files:
                    os.remove(os.path.join(directory, file))
    return os.path.join(directory, name)
