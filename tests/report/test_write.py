"""A page is put into a work directory whole, and nothing else is touched."""

import os

import numpy as np
import pytest

from densenet_jax.errors import UserError
from densenet_jax.report.page import Picture, write_page
from densenet_jax.report.plots import picture

PNG = picture(np.zeros((4, 4, 1), np.uint8))


def test_later_page_replaces_the_earlier_and_its_surplus_images(tmp_path):
    many = [Picture(f"mistake_{number:02d}", PNG, "alt") for number in range(3)]
    path = write_page(str(tmp_path), "index.html", "old", [*many, Picture("loss", PNG, "alt", PNG)])
    assert path == str(tmp_path / "report" / "index.html")
    (tmp_path / "report" / "notes.png").write_bytes(b"a person's own")
    write_page(str(tmp_path), "compare.html", "beside", [])
    assert len(os.listdir(tmp_path / "report")) == 8
    write_page(str(tmp_path), "index.html", "né", many[:1], {"per_class.csv": b"a,b"})
    assert sorted(os.listdir(tmp_path / "report")) == [
        "compare.html",
        "index.html",
        "loss.png",
        "loss_dark.png",
        "mistake_00.png",
        "notes.png",
        "per_class.csv",
    ]
    assert (tmp_path / "report" / "index.html").read_text("utf-8") == "né"
    assert os.listdir(tmp_path) == ["report"]


def test_page_stays_whole_when_writing_fails(tmp_path, monkeypatch):
    write_page(str(tmp_path), "index.html", "old", [])

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(UserError, match=r"No space left on device.*--mode report"):
        write_page(str(tmp_path), "index.html", "new", [Picture("loss", PNG, "alt")])
    assert os.listdir(tmp_path / "report") == ["index.html"]
    assert (tmp_path / "report" / "index.html").read_text() == "old"


def test_directory_that_is_a_file_is_a_users_mistake(tmp_path):
    (tmp_path / "report").write_text("")
    with pytest.raises(UserError, match="can't be written"):
        write_page(str(tmp_path), "index.html", "new", [])
