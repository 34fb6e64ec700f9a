"""Builds HTML pages from plain data: one file without scripts or network access, for wide, narrow, light and dark.

All text is escaped here, and only this module writes tags.
"""

import base64
import dataclasses
import html
import os
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence

from densenet_jax.errors import report_write_errors
from densenet_jax.system.disk import replace_file

DIRECTORY = "report"
_NUMBERED = re.compile(r"(mistake|augmented)_\d+\.png")  # the next page may have fewer of these
_STYLE = pathlib.Path(__file__).with_name("style.css").read_text(encoding="utf-8")


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture on the page, also written as a file beside it."""

    name: str  # file name without extension
    png: bytes
    alt: str  # description for screen readers
    dark_png: bytes | None = None  # version for dark pages; None uses `png` for both

    def files(self) -> dict[str, bytes]:
        """Returns the content of each file by its name."""
        dark = {} if self.dark_png is None else {f"{self.name}_dark.png": self.dark_png}
        return {f"{self.name}.png": self.png, **dark}


def document(title: str, *blocks: str) -> str:
    """Returns a complete page."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>\n{_STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{html.escape(title)}</h1>\n" + "\n".join(blocks) + "\n</body>\n</html>\n"
    )


def section(title: str, *blocks: str) -> str:
    """Returns a heading followed by blocks."""
    return "\n".join((f"<section>\n<h2>{html.escape(title)}</h2>", *blocks, "</section>"))


def text(words: str, *, quiet: bool = False) -> str:
    """Returns a paragraph."""
    kind = ' class="quiet"' if quiet else ""
    return f"<p{kind}>{html.escape(words)}</p>"


def tiles(figures: Iterable[tuple[str, str]]) -> str:
    """Returns (name, value) pairs as tiles with large values."""
    cells = (f"<div><b>{html.escape(value)}</b><span>{html.escape(what)}</span></div>" for what, value in figures)
    return f'<div class="tiles">{"".join(cells)}</div>'


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: Sequence[int] = ()) -> str:
    """Returns a table that scrolls on narrow screens; the columns in `numbers` are right-aligned."""

    def row(cells: Sequence[str], tag: str) -> str:
        kinds = (' class="number"' if place in numbers else "" for place in range(len(cells)))
        inner = (f"<{tag}{kind}>{html.escape(cell)}</{tag}>" for kind, cell in zip(kinds, cells, strict=True))
        return f"<tr>{''.join(inner)}</tr>"

    body = "\n".join(row(cells, "td") for cells in rows)
    return (
        f'<div class="scroll"><table>\n<thead>{row(headings, "th")}</thead>\n<tbody>\n{body}\n</tbody>\n</table></div>'
    )


def fold(summary: str, *blocks: str) -> str:
    """Returns blocks that are hidden until their summary line is clicked."""
    return "\n".join((f"<details><summary>{html.escape(summary)}</summary>", *blocks, "</details>"))


def command(what: str, line: str) -> str:
    """Returns a shell command with a sentence about what it does."""
    return f"<p>{html.escape(what)}</p>\n<pre><code>{html.escape(line)}</code></pre>"


def charts(entries: Iterable[tuple[str, Picture]]) -> str:
    """Returns (title, picture) pairs in as many columns as fit."""
    inner = (
        f"<figure><figcaption>{html.escape(title)}</figcaption>{_image(picture)}</figure>" for title, picture in entries
    )
    return f'<div class="charts">{"".join(inner)}</div>'


def images(entries: Iterable[tuple[Picture, str, str]], *, enlarged: bool = False, wide: bool = False) -> str:
    """Returns a grid of small images, each with a heading and further text.

    Args:
        enlarged: whether to show sharp pixels instead of smoothing them.
        wide: whether the pictures need the room of two.
    """
    inner = (
        f"<figure>{_image(picture)}<figcaption><b>{html.escape(heading)}</b>"
        f"{f'<br>{html.escape(more)}' if more else ''}</figcaption></figure>"
        for picture, heading, more in entries
    )
    kind = " wide" if wide else "" if enlarged else " smooth"
    return f'<div class="images{kind}">{"".join(inner)}</div>'


def _image(picture: Picture) -> str:
    image = f'<img src="{_data_uri(picture.png)}" alt="{html.escape(picture.alt)}">'
    if picture.dark_png is None:
        return image
    dark = f'<source srcset="{_data_uri(picture.dark_png)}" media="(prefers-color-scheme: dark)">'
    return f"<picture>{dark}{image}</picture>"


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"


def write_page(
    workdir: str, name: str, content: str, pictures: Iterable[Picture], tables: Mapping[str, bytes] = {}
) -> str:
    """Writes `workdir/report/NAME`, its pictures as PNG files and `tables` beside it, and returns the page's path.

    The page embeds its pictures and is replaced in one step, so a reader sees the old page or the new one.

    Raises:
        UserError: the directory can't be written to.
    """
    directory = os.path.join(workdir, DIRECTORY)
    files = {file: png for picture in pictures for file, png in picture.files().items()}
    with report_write_errors(f"the report in {directory}", "fix that, then run --mode report"):
        os.makedirs(directory, exist_ok=True)
        for file, written in {**files, **tables, name: content.encode("utf-8")}.items():
            with replace_file(os.path.join(directory, file)) as stream:
                stream.write(written)
        if name == "index.html":
            for file in os.listdir(directory):
                if _NUMBERED.fullmatch(file) and file not in files:
                    os.remove(os.path.join(directory, file))
    return os.path.join(directory, name)
