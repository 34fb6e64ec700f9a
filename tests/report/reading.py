"""What a person would find on a page, read by a parser that refuses tags that don't fit."""

import base64
import html.parser
import io
import re

import numpy as np
import pytest
from PIL import Image

from densenet_jax.report import data, plots, sections
from densenet_jax.report.page import Picture

_VOID = {"meta", "img", "br", "source"}


class Page(html.parser.HTMLParser):
    """The text of a page, its pictures and everything that it refers to."""

    def __init__(self, content: str):
        super().__init__()
        self.words: list[str] = []
        self.pictures: list[Image.Image] = []
        self.tags: list[str] = []
        self._open: list[str] = []
        self.feed(content)
        self.close()
        assert self._open == []
        self.text = re.sub(r"\s+", " ", " ".join(self.words))

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in _VOID:
            self._open.append(tag)
        for name, value in attrs:
            assert not name.startswith("on")
            if name in ("src", "srcset", "href"):
                kind, _, data = value.partition(",")
                assert kind == "data:image/png;base64"
                self.pictures.append(Image.open(io.BytesIO(base64.b64decode(data, validate=True))))
                self.pictures[-1].load()
            if tag == "img" and name == "alt":
                assert value

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open and self._open[-1] != "style":
            self.words.append(data)


def records(epochs: int, *, validated: bool = True, offset: float = 0.0) -> list[dict]:
    """Reports of a run, two of training and one of validation an epoch."""
    lines = []
    for step in range(1, 2 * epochs + 1):
        figures = {"step": step, "epoch": step / 2, "loss": 2.0 / step + offset, "top1": 1 - 0.5 / step, "top5": 1.0}
        speed = {"learning_rate": 0.1 / step, "images_per_sec": 100.0 * step, "data_wait_fraction": 0.25}
        lines.append({**figures, "split": "train", **speed})
        if validated and step % 2 == 0:
            lines.append({**figures, "split": "validation", "top1": 0.9 - 0.1 / step})
    return lines


def replace_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts a dot in the place of every chart of a page: drawing them takes most of the page's time."""
    dot = plots.picture(np.zeros((1, 1, 1), np.uint8))
    for module in (data, plots, sections):
        monkeypatch.setattr(module, "make_picture", lambda name, alt, *_, **__: Picture(name, dot, alt, dot))
