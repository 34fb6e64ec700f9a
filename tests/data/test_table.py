"""Data sets that a CSV or Parquet table lists: labels, splits, groups, and every mistake in one line."""

import io
import os

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import csv as arrow_csv
from pyarrow import parquet

from densenet_jax.data.identity import check_identity, identify
from densenet_jax.data.pipeline import eval_batches, train_batches
from densenet_jax.data.records import DamagedImage
from densenet_jax.data.settings import Labels, TableSettings
from densenet_jax.data.sources import open_source
from densenet_jax.data.table import TableSource
from densenet_jax.data.transforms import eval_transform, train_transform
from densenet_jax.errors import UserError

MULTI = Labels(many=True)


def png(value):
    file = io.BytesIO()
    Image.fromarray(np.full((4, 4), value, np.uint8)).save(file, "PNG")
    return file.getvalue()


def write(folder, text, name="table.csv", images=()):
    """Writes a table, and an image for each path in its first column unless `images` names them."""
    (folder / name).write_text(text, encoding="utf-8")
    lines = text.lstrip("\ufeff").splitlines()[1:]
    for number, path in enumerate(images or [line.split(",")[0].strip('"') for line in lines]):
        place = folder / path
        if path and ".." not in path and not path.startswith("/"):
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(png(number))
    return str(folder / name)


def open_table(path, split="train", labels=Labels(), order="text", **settings):  # noqa: B008
    return TableSource(TableSettings(path, **settings), "", split, labels, order)


CLASSES = "path,kind,part\na.png,cat,train\nb/c.png,dog,train\nd.png,cat,test\n"
SEVERAL = "path,who,edema,mass\na.png,7,1,\nb.png,8,0,-1\nc.png,7,nan,1.0\nd.png,9,-1,0\n"


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_one_column_of_class_names(tmp_path, kind):
    path = write(tmp_path, CLASSES)
    if kind == "parquet":
        parquet.write_table(arrow_csv.read_csv(path), tmp_path / "table.parquet")
        path = str(tmp_path / "table.parquet")
    train = open_table(path, label_columns=("kind",), split_column="part")
    test = open_table(path, "test", label_columns=("kind",), split_column="part")
    assert train.class_names == test.class_names == ("cat", "dog")
    assert [(train[i].name, train[i].label, train[i].image) for i in range(2)] == [
        ("a.png", 0, png(0)),
        ("b/c.png", 1, png(1)),
    ]
    np.testing.assert_array_equal(train.labels(), np.array([0, 1], np.int32))
    assert (len(test), test[0].name, test.labels().dtype, test.groups()) == (1, "d.png", np.int32, None)


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (MULTI, [[1, np.nan], [0, np.nan], [np.nan, 1], [np.nan, 0]]),
        (Labels(True, "zero"), [[1, np.nan], [0, 0], [np.nan, 1], [0, 0]]),
        (Labels(True, "one", "zero"), [[1, 0], [0, 1], [0, 1], [1, 0]]),
    ],
)
def test_a_column_a_label(tmp_path, labels, expected):
    source = open_table(write(tmp_path, SEVERAL), labels=labels, label_columns=("edema", "mass"), group_column="who")
    assert (source.class_names, source.num_classes, source.many_labels) == (("edema", "mass"), 2, True)
    np.testing.assert_array_equal(source.labels(), np.array(expected, np.float32))
    assert source.labels().dtype == source[0].label.dtype == np.float32
    np.testing.assert_array_equal(source[2].label, source.labels()[2])
    np.testing.assert_array_equal(source.groups(), [0, 1, 0, 2])


def test_a_parquet_file_has_numbers_nulls_and_switches(tmp_path):
    write(tmp_path, "path\na.png\nb.png\nc.png\n")
    columns = {
        "path": ["a.png", "b.png", "c.png"],
        "edema": pa.array([1, None, -1], pa.int8()),
        "mass": pa.array([True, False, None]),
        "nodule": pa.array([0.0, float("nan"), 1.0], pa.float64()),
    }
    parquet.write_table(pa.table(columns), tmp_path / "t.parquet")
    source = open_table(str(tmp_path / "t.parquet"), labels=MULTI, label_columns=("edema", "mass", "nodule"))
    nan = np.nan
    np.testing.assert_array_equal(source.labels(), np.float32([[1, 1, 0], [nan, 0, nan], [nan, nan, 1]]))


@pytest.mark.parametrize(("none", "last"), [("none", [np.nan] * 3), ("", [0, 0, 0])])
def test_names_joined_in_one_column(tmp_path, none, last):
    path = write(tmp_path, f"path,found\na.png,mass|edema\nb.png,{none}\nc.png,hernia\nd.png,\n")
    source = open_table(path, labels=MULTI, label_columns=("found",), label_separator="|", label_none=none)
    assert source.class_names == ("edema", "hernia", "mass")
    np.testing.assert_array_equal(source.labels(), np.float32([[1, 0, 1], [0, 0, 0], [0, 1, 0], last]))


def test_splits_by_lists(tmp_path, caplog):
    path = write(tmp_path, CLASSES)
    (tmp_path / "train.txt").write_text("d.png\na.png\n")
    (tmp_path / "test.txt").write_text("b/c.png\n\n")
    lists = (("train", "train.txt"), ("test", str(tmp_path / "test.txt")))
    train = open_table(path, label_columns=("kind",), split_lists=lists)
    assert [train[i].name for i in range(2)] == ["a.png", "d.png"]
    assert len(open_table(path, "test", label_columns=("kind",), split_lists=lists)) == 1
    open_table(path, label_columns=("kind",), split_lists=lists[:1])
    assert "1 rows" in caplog.text
    (tmp_path / "test.txt").write_text("a.png\n")
    with pytest.raises(UserError, match=r"test.txt lists 'a.png', which config.data.split_lists puts into 'train' and"):
        open_table(path, label_columns=("kind",), split_lists=lists)
    (tmp_path / "test.txt").write_text("e.png\n")
    with pytest.raises(UserError, match=r"test.txt lists 'e.png', which .*table.csv lacks"):
        open_table(path, label_columns=("kind",), split_lists=lists)


def test_a_table_a_split(tmp_path):
    write(tmp_path, "path,who,x,y\na.png,1,1,0\nb.png,2,,1\n", "train.csv")
    write(tmp_path, "path,who,y,x\nc.png,3,0,1\n", "valid.csv")
    settings = {"label_columns": ("x", "y"), "labels": MULTI, "eval_split": "valid", "group_column": "who"}
    path = str(tmp_path / "{split}.csv")
    np.testing.assert_array_equal(open_table(path, **settings).labels(), np.float32([[1, 0], [np.nan, 1]]))
    np.testing.assert_array_equal(open_table(path, "valid", **settings).labels(), np.float32([[1, 0]]))
    write(tmp_path, "path,who,x,y\nc.png,2,0,1\n", "valid.csv")
    with pytest.raises(UserError, match="Group '2' of column 'who' is in two splits, 'train' and 'valid'"):
        open_table(path, **settings)
    write(tmp_path, "path,who,x,y\nc.png,3,0,1\na.png,4,0,1\n", "valid.csv")
    with pytest.raises(UserError, match=r"'a.png' is in two splits.*train.csv row 1 and .*valid.csv row 2"):
        open_table(path, **settings)


def test_a_holdout_keeps_groups_whole(tmp_path):
    rows = "".join(f"{i}.png,{'ab'[i % 2]},p{i * 7 % 13}\n" for i in range(60))
    table = TableSettings(write(tmp_path, f"path,kind,who\n{rows}"), label_columns=("kind",), group_column="who")

    def names(split, holdout):
        part = open_source("table", "", split, holdout=holdout, table=table)
        assert len(part.groups()) == len(part) == len(part.labels())
        return {part[i].name for i in range(len(part))}, set(part.groups().tolist())

    for holdout in (1, 10, 0.3, 40):
        (train, train_groups), (held, held_groups) = names("train", holdout), names("holdout", holdout)
        assert not train_groups & held_groups
        assert len(train | held) == 60
        assert len(held) >= (holdout if holdout >= 1 else holdout * 60)
    assert names("holdout", 10)[0] < names("holdout", 30)[0]
    with pytest.raises(UserError, match="holds out 60 of the 60 training images in whole groups"):
        names("train", 59)


def test_paths_are_made_relative(tmp_path):
    text = f"path,kind\n./a.png,x\n.//b/./c.png,y\n{tmp_path}/d.png,x\n"
    path = write(tmp_path, text, images=["a.png", "b/c.png", "d.png"])
    source = TableSource(TableSettings(path, label_columns=("kind",)), str(tmp_path))
    assert [source[i].name for i in range(3)] == ["a.png", "b/c.png", "d.png"]


def test_other_delimiters_quotes_and_a_byte_order_mark(tmp_path):
    (tmp_path / "a b.png").write_bytes(png(0))
    (tmp_path / "table.csv").write_bytes('\ufeffpath;"the kind"\r\n"a b.png";"one\r\nline, two"\r\n'.encode())
    source = open_table(str(tmp_path / "table.csv"), label_columns=("the kind",))
    assert source.class_names == ("one\r\nline, two",)
    assert source[0].name == "a b.png"


ONE = {"label_columns": ("kind",)}
TWO = {"label_columns": ("edema", "mass"), "labels": MULTI}


@pytest.mark.parametrize(
    ("text", "settings", "message"),
    [
        (CLASSES, {"label_columns": ("kin",)}, "label_columns names the column 'kin', .* nearest is 'kind'"),
        (CLASSES, ONE | {"image_column": "Path"}, "config.data.image_column names the column 'Path'.*'path'"),
        (CLASSES, ONE | {"split_column": "prat"}, "config.data.split_column names the column 'prat'.*'part'"),
        (CLASSES, ONE | {"group_column": "who"}, "config.data.group_column names the column 'who'"),
        (CLASSES, {}, r"label_columns is \(\); expected columns of .*, which has 'path', 'kind', 'part'"),
        (CLASSES, ONE | {"labels": MULTI}, "table.csv row 1 has 'cat' in column 'kind'; expected 1, 0, -1"),
        (SEVERAL, {"label_columns": ("edema", "mass")}, "has 2 columns, but config.data.labels is single"),
        (SEVERAL, TWO | {"label_separator": "|"}, "label_separator is '|'; it needs"),
        (SEVERAL.replace("c.png,7,nan", "c.png,7,2"), TWO, "row 3 has '2' in column 'edema'; expected 1, 0, -1"),
        (SEVERAL, TWO | {"label_columns": ("mass", "mass")}, "label_columns has 'mass' twice"),
        ("path,kind\na.png,cat\na.png,dog\n", ONE, "'a.png' is in two rows .*row 1 and .*row 2"),
        (CLASSES + "a.png,cat,test\n", ONE | {"split_column": "part"}, "'a.png' is in two splits, 'train' and 'test'"),
        (CLASSES, ONE | {"group_column": "kind", "split_column": "part"}, "Group 'cat' of column 'kind' is in two"),
        (SEVERAL, TWO | {"split_column": "path"}, "split_column names the column 'path', which is the image_column"),
        ("path,kind\na.png,cat\nb.png,\n", ONE, "row 2 has nothing in column 'kind'"),
        ("path,kind\n,cat\n", ONE, "row 1 names no image"),
        ("path,kind\n../a.png,cat\n", ONE, "row 1 names the image '../a.png', which leaves config.data.dir"),
        ("path,kind\n/etc/passwd,cat\n", ONE, "row 1 names the image '/etc/passwd', which leaves"),
        ("path,kind\na/../../b.png,cat\n", ONE, "which leaves config.data.dir"),
        ("path,kind\n", ONE, "has no rows"),
        ("", ONE, "table.csv can't be read .*no columns"),
        ("a.png,cat\nb.png,dog\n", ONE, "names the column 'path', which .* lacks; .*its first line must name"),
        ("path,kind\na.png,cat,3\n", ONE, "table.csv can't be read .*Expected 2 columns, got 3"),
        ("path,kind,kind\na.png,1,2\n", ONE, "has 2 columns named 'kind'"),
        (CLASSES, ONE | {"split_column": "part", "split": "validation"}, "no split 'validation'; .* 'train', 'test'"),
        (CLASSES, ONE | {"split_column": "part", "split_lists": (("a", "b"),)}, "both name the splits"),
        (CLASSES, ONE | {"split": "test"}, "no split 'test'; its splits are 'train'. Name config.data.split_column"),
    ],
)  # fmt: skip
def test_mistakes_in_one_line(tmp_path, text, settings, message):
    with pytest.raises(UserError, match=message) as error:
        open_table(write(tmp_path, text), **settings)
    assert "\n" not in str(error.value)


def test_files_that_are_no_tables(tmp_path):
    for name, content in (("t.csv", b"path,kind\n\xff\xfe.png,1\n"), ("t.parquet", b"PAR1 no"), ("t.csv", b"\0" * 99)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match="config"):
            open_table(str(tmp_path / name), **ONE)
    with pytest.raises(UserError, match=r"gone.csv can't be read \(no such file\)"):
        open_table(str(tmp_path / "gone.csv"), **ONE)
    with pytest.raises(UserError, match=r"config.data.table is empty"):
        open_source("table", str(tmp_path))
    with pytest.raises(UserError, match="labels is multi, but digits has one class"):
        open_source("digits", str(tmp_path), labels=MULTI)


def test_missing_files_are_listed_and_vanished_ones_named(tmp_path):
    path = write(tmp_path, CLASSES, images=["a.png", "d.png"])
    os.mkdir(tmp_path / "b")
    os.mkdir(tmp_path / "b" / "c.png")
    with pytest.raises(UserError, match=r"1 of 3 images that .* are no files in .*: 'b/c.png' \(.*row 2\)"):
        open_table(path, **ONE)
    os.rmdir(tmp_path / "b" / "c.png")
    (tmp_path / "b" / "c.png").write_bytes(png(0))
    source = open_table(path, **ONE)
    os.remove(tmp_path / "a.png")
    with pytest.raises(DamagedImage, match=r"a.png"):
        source[0]


def test_a_changed_table_is_read_again(tmp_path):
    assert len(open_table(write(tmp_path, CLASSES), **ONE)) == 3
    assert len(open_table(write(tmp_path, CLASSES + "e.png,cat,train\n"), **ONE)) == 4


def test_identity_notices_rows_and_labels(tmp_path):
    def identity(text, **settings):
        return identify("table", {"train": open_table(write(tmp_path, text), **settings)})

    several = identity(SEVERAL, **TWO)
    check_identity(several, identity(SEVERAL, **TWO), "the checkpoint")
    for changed, message in (
        (SEVERAL.replace("b.png", "x.png"), "'edema' other files"),
        (SEVERAL.replace("d.png,9,-1,0", "d.png,9,0,0"), "'edema' other files"),
        (SEVERAL.replace("8,0", "8,1"), "'edema' 2, had 1"),
        (SEVERAL + "e.png,9,1,1\n", "5 images and had 4"),
        (SEVERAL.replace("edema,mass", "mass,edema"), "would be number 1 and was 0"),
    ):
        settings = TWO | {"label_columns": ("mass", "edema") if "mass,edema" in changed else ("edema", "mass")}
        with pytest.raises(UserError, match=message):
            check_identity(several, identity(changed, **settings), "the checkpoint")
    one = identity(CLASSES, **ONE)
    with pytest.raises(UserError, match="'cat' other files"):
        check_identity(one, identity(CLASSES.replace("d.png", "e.png"), **ONE), "the checkpoint")


def test_batches_are_the_same_on_any_number_of_processes(tmp_path):
    rows = "".join(f"{i}.png,{i % 2},{'' if i % 3 else 1}\n" for i in range(10))
    source = open_table(write(tmp_path, f"path,x,y\n{rows}"), labels=MULTI, label_columns=("x", "y"))

    def take(process, count, start, **kind):
        with train_batches(
            source, seed=1, global_batch_size=4, transform=train_transform(image_size_px=4, channels=1, **kind),
            process_index=process, process_count=count, start_step=start,
        ) as batches:  # fmt: skip
            return [next(batches) for _ in range(4)]

    for kind in ({"kind": "none"}, {"kind": "random_resized_crop"}):
        whole, halves, late = take(0, 1, 0, **kind), [take(p, 2, 0, **kind) for p in (0, 1)], take(0, 1, 2, **kind)
        for step, batch in enumerate(whole):
            assert (batch["label"].shape, batch["label"].dtype) == ((4, 2), np.float32)
            for key in batch:
                np.testing.assert_array_equal(batch[key], np.concatenate([half[step][key] for half in halves]))
        np.testing.assert_array_equal(whole[2]["label"], late[0]["label"])
        np.testing.assert_array_equal(whole[2]["image"], late[0]["image"])
    transform = eval_transform(image_size_px=4, resize_px=4, channels=1)
    with eval_batches(source, global_batch_size=4, transform=transform) as batches:
        batches = list(batches)
    labels = np.concatenate([batch["label"] for batch in batches])[np.concatenate([b["mask"] for b in batches])]
    np.testing.assert_array_equal(labels, source.labels())
