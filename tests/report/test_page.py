"""Pages are well formed, whole without a network, and escape what they are given."""

import numpy as np
import pytest

from densenet_jax.report import page
from densenet_jax.report.plots import picture
from tests.report.reading import Page

EVIL = "<script>alert('x')</script> & \"quoted\""
PNG = picture(np.zeros((4, 4, 1), np.uint8))


@pytest.mark.parametrize(
    "block",
    [
        page.section(EVIL),
        page.text(EVIL),
        page.text(EVIL, quiet=True),
        page.tiles([("figure", EVIL)]),
        page.tiles([(EVIL, "1")]),
        page.table([EVIL], [["x"]]),
        page.table(["x"], [[EVIL]], numbers=(0,)),
        page.fold(EVIL, page.text("x")),
        page.command("what", EVIL),
        page.command(EVIL, "line"),
        page.charts([(EVIL, page.Picture("a", PNG, "alt", PNG))]),
        page.images([(page.Picture("a", PNG, "alt"), EVIL, "")], enlarged=True),
        page.images([(page.Picture("a", PNG, "alt"), "x", EVIL)], enlarged=False),
        "",
    ],
)
def test_text_from_outside_stays_text(block):
    shown = Page(page.document(EVIL if not block else "title", block))
    assert "script" not in shown.tags
    assert EVIL in shown.text


def test_description_of_a_picture_is_escaped():
    content = page.document("title", page.charts([("chart", page.Picture("a", PNG, EVIL))]))
    assert "alert('x')</script>" not in content
    assert "script" not in Page(content).tags


def test_page_refers_to_nothing_outside():
    content = page.document("title", page.charts([("chart", page.Picture("a", PNG, "alt", PNG))]))
    shown = Page(content)
    assert len(shown.pictures) == 2
    assert "http" not in content
    assert "@import" not in content
    assert "url(" not in content


def test_picture_for_both_pages_is_one_file_and_for_each_two():
    assert list(page.Picture("a", PNG, "alt").files()) == ["a.png"]
    assert list(page.Picture("a", PNG, "alt", PNG).files()) == ["a.png", "a_dark.png"]
