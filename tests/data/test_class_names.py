"""Any class name comes back from labels.txt as it was, and old files are read as ever."""

import pytest

from densenet_jax.data.class_names import format_labels, natural_key, read_labels
from densenet_jax.errors import UserError

NAMES = (
    "plain", "# one", "#", "#two", " leading", "trailing ", "two\nlines", "carriage\rreturn", "\ufeffmarked",
    "tab\tbed", '"quoted"', '"half', "$x_1$", "nbsp\u00a0", "line\u2028separator", "日本", "a,b", "back\\slash",
    "\x1b[31mred", "'", "<b>",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_round_trip(tmp_path, name):
    for names in ((name, "other"), ("# first", name)):
        path = tmp_path / "labels.txt"
        path.write_text(format_labels(names), encoding="utf-8")
        assert read_labels(path) == names


def test_plain_names_are_written_as_ever():
    assert format_labels(["cat", '"dog"']) == 'cat\n"dog"\n'


@pytest.mark.parametrize(
    "data",
    [b"cat\ndog\n", b"\xef\xbb\xbfcat\r\ndog\r\n", b"# animals\n\n cat\n#\ndog", b"cat\rdog"],
    ids=["plain", "byte-order mark", "comments", "old Mac"],
)
def test_files_of_others(tmp_path, data):
    (tmp_path / "labels.txt").write_bytes(data)
    assert read_labels(tmp_path / "labels.txt") == ("cat", "dog")


@pytest.mark.parametrize(
    ("data", "why"),
    [(b"", "holds no labels"), (b"# \n\n", "holds no labels"), ("cat\n".encode("utf-16"), "can't be read as labels"),
     (b'# Lines that begin with " are JSON strings.\n"broken\n', "can't be read as labels"),
     (b'# Lines that begin with " are JSON strings.\n"\\ud800"\n', "can't be read as labels.*surrogates")],
)  # fmt: skip
def test_other_files_than_lists_of_names_are_refused(tmp_path, data, why):
    (tmp_path / "labels.txt").write_bytes(data)
    with pytest.raises(UserError, match=why):
        read_labels(tmp_path / "labels.txt")


def test_natural_order():
    names = ["10", "9", "b2", "B10", "b1", "a", "01", "1", "²"]
    assert sorted(names, key=natural_key) == ["01", "1", "9", "10", "a", "b1", "b2", "B10", "²"]
