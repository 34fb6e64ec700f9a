"""Preparing a data set can be interrupted and repeated, and what is wrong with the data is listed."""

import io
import json
import os
import shutil
import struct
import sys
import tarfile

import numpy as np
import pytest
from array_record.python import array_record_module

from densenet_jax.data import convert
from densenet_jax.data.prepare import prepare_dataset, verify_split
from densenet_jax.data.records import Record
from densenet_jax.data.settings import Labels, TableSettings
from densenet_jax.data.sources import open_source
from densenet_jax.errors import UserError
from tests.data import fake_imagenet


def as_tfrecord(path):
    """Turns the ArrayRecord files of the set in `path` into TFRecord files, as TensorFlow users have them."""
    for name in os.listdir(path):
        if "array_record" not in name:
            continue
        reader = array_record_module.ArrayRecordReader(os.path.join(path, name))
        with open(os.path.join(path, name.replace("array_record", "tfrecord")), "wb") as file:
            for record in reader.read_all():
                file.write(struct.pack("<QI", len(record), 0) + record + struct.pack("<I", 0))
        reader.close()
        os.remove(os.path.join(path, name))
    info = os.path.join(path, "dataset_info.json")
    with open(info, encoding="utf-8") as file:
        content = json.load(file) | {"fileFormat": "tfrecord"}
    with open(info, "w", encoding="utf-8") as file:
        json.dump(content, file)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    directory = tmp_path_factory.mktemp("original")
    fake_imagenet.write(str(directory), train=13, validation=4, num_classes=5)
    return directory


@pytest.fixture
def tfrecords(original, tmp_path):
    shutil.copytree(original, tmp_path / "data")
    path = str(tmp_path / "data" / "imagenet2012" / "5.1.0")
    as_tfrecord(path)
    return str(tmp_path / "data"), path


def test_tfrecord_sets_are_converted_without_tensorflow(original, tfrecords):
    directory, path = tfrecords
    with pytest.raises(UserError, match="tfrecord"):
        open_source("imagenet2012", directory, "train")
    seen = []
    reports = prepare_dataset("imagenet2012", directory, progress=lambda *state: seen.append(state))
    assert ("convert to ArrayRecord", 4, 4) in seen
    assert seen[-1] == ("verify validation", 4, 4)
    assert [(report.split, report.examples, report.damaged) for report in reports] == [
        ("train", 13, ()), ("validation", 4, ()),
    ]  # fmt: skip
    for split in ("train", "validation"):
        want, got = open_source("imagenet2012", str(original), split), open_source("imagenet2012", directory, split)
        assert [got[index] for index in range(len(got))] == [want[index] for index in range(len(want))]
    assert convert.stored_formats(path) == ("tfrecord", "array_record")
    assert len([name for name in os.listdir(path) if ".tfrecord-" in name]) == 4  # and TensorFlow users lose nothing
    assert not any(name.split(".")[0] == "tensorflow" for name in sys.modules)


def test_a_conversion_goes_on_where_it_stopped(tfrecords):
    directory, path = tfrecords

    class KilledError(Exception):
        pass

    def stop(what, done, total):
        if done == 2:
            raise KilledError

    with pytest.raises(KilledError):
        convert.convert_to_array_record(path, stop, workers=1)
    assert convert.stored_formats(path) == ("tfrecord",)
    converted = sorted(name for name in os.listdir(path) if ".array_record-" in name)
    assert len(converted) >= 2
    for name in converted[2:]:  # a fast machine is through before it is stopped
        os.remove(os.path.join(path, name))
    del converted[2:]
    times = {name: os.stat(os.path.join(path, name)).st_mtime_ns for name in converted}
    cut = os.path.join(path, converted[0])
    with open(cut, "r+b") as file:  # as a full disk would leave it
        file.truncate(1000)
    prepare_dataset("imagenet2012", directory)
    assert len(open_source("imagenet2012", directory, "train")) == 13
    assert os.stat(os.path.join(path, converted[1])).st_mtime_ns == times[converted[1]]
    assert os.path.getsize(cut) > 1000


@pytest.mark.parametrize("damage", ["truncated", "short", "missing"])
def test_damaged_tfrecords_are_named(tfrecords, damage):
    directory, path = tfrecords
    name = "imagenet2012-train.tfrecord-00001-of-00002"
    file = os.path.join(path, name)
    with open(file, "rb") as stream:
        content = stream.read()
    if damage == "missing":
        os.remove(file)
    else:
        first = 16 + struct.unpack("<Q", content[:8])[0]
        with open(file, "wb") as stream:
            stream.write(content[: first if damage == "short" else len(content) // 2])
    with pytest.raises(UserError, match=name):
        prepare_dataset("imagenet2012", directory)
    assert not [entry for entry in os.listdir(path) if entry.endswith(".tmp")]


def test_verification_lists_damaged_images_and_counts(tmp_path):
    replace = {"train_3.JPEG": fake_imagenet.jpeg(3)[:700], "train_70.JPEG": b"no image"}
    fake_imagenet.write(str(tmp_path), train=130, validation=5, num_classes=6, replace=replace)
    reports = prepare_dataset("imagenet2012", str(tmp_path))
    train = reports[0]
    assert [name for name, _ in train.damaged] == ["train_3.JPEG", "train_70.JPEG"]
    assert [(report.examples, report.expected) for report in reports] == [(130, 1_281_167), (5, 50_000)]
    assert reports[1].damaged == ()


def test_digits_and_folders(tmp_path):
    reports = prepare_dataset("digits", str(tmp_path))
    assert reports == [("train", 1437, 1437, ()), ("test", 360, 360, ())]
    for split in ("train", "val"):
        for label in ("ant", "bee"):
            (tmp_path / "tree" / split / label).mkdir(parents=True)
            (tmp_path / "tree" / split / label / "a.jpg").write_bytes(fake_imagenet.jpeg(1))
    (tmp_path / "tree" / "train" / "bee" / "broken.jpg").write_bytes(b"\xff\xd8")
    train, validation = prepare_dataset("folder", str(tmp_path / "tree"))
    assert train.damaged[0][0] == "train/bee/broken.jpg"
    assert (train.examples, validation.examples) == (3, 2)


def test_labels_outside_the_classes_are_damage():
    class Labeled:
        num_classes = 2
        class_names = ("a", "b")
        many_labels = False

        def __len__(self):
            return 1

        def __getitem__(self, index):
            return Record(image=fake_imagenet.jpeg(0), label=-1, name="test_image")

        def labels(self):
            return np.array([-1], np.int32)

    assert "label -1" in verify_split(Labeled(), "test").damaged[0][1]


def test_manual_downloads_are_explained(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"ILSVRC2012_img_train\.tar .*image-net\.org"):
        prepare_dataset("imagenet2012", str(tmp_path))
    (tmp_path / "downloads" / "manual").mkdir(parents=True)
    (tmp_path / "downloads" / "manual" / "ILSVRC2012_img_train.tar").write_bytes(b"")
    with pytest.raises(UserError, match=r"ILSVRC2012_img_val\.tar"):
        prepare_dataset("imagenet2012", str(tmp_path))
    (tmp_path / "downloads" / "manual" / "ILSVRC2012_img_val.tar").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with pytest.raises(UserError, match=r"pip install tensorflow-cpu==2\.21\.0"):
        prepare_dataset("imagenet2012", str(tmp_path))
    with pytest.raises(UserError, match="no_such_set"):
        prepare_dataset("no_such_set", str(tmp_path))
    with pytest.raises(UserError, match="object storage"):
        prepare_dataset("imagenet2012", "gs://bucket/data")


def test_imagenet_is_prepared_from_its_archives(tmp_path):
    """Runs only where TensorFlow is installed: tfds reads the archives with it."""
    pytest.importorskip("tensorflow")
    manual = tmp_path / "downloads" / "manual"
    manual.mkdir(parents=True)

    def add(archive, name, content):
        member = tarfile.TarInfo(name)
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))

    synsets = ("n01440764", "n15075141")
    with tarfile.open(manual / "ILSVRC2012_img_train.tar", "w") as outer:
        for synset in synsets:
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as archive:
                for index in range(3):
                    add(archive, f"{synset}_{index}.JPEG", fake_imagenet.jpeg(index))
            add(outer, f"{synset}.tar", inner.getvalue())
    with tarfile.open(manual / "ILSVRC2012_img_val.tar", "w") as archive:
        for index in range(1, 4):
            add(archive, f"ILSVRC2012_val_{index:08d}.JPEG", fake_imagenet.jpeg(index))
    train, validation = prepare_dataset("imagenet2012", str(tmp_path))
    assert (train.examples, validation.examples) == (6, 3)
    assert train.damaged == validation.damaged == ()
    source = open_source("imagenet2012", str(tmp_path), "train")
    assert source.num_classes == 1000
    assert {source[index].label for index in range(6)} == {0, 999}
    assert {source[index].name for index in range(6)} == {f"{s}_{i}.JPEG" for s in synsets for i in range(3)}


def test_a_table_is_verified_split_by_split(tmp_path):
    for name, data in (("a.jpg", fake_imagenet.jpeg(0)), ("b.jpg", b"broken"), ("c.jpg", fake_imagenet.jpeg(1))):
        (tmp_path / name).write_bytes(data)
    (tmp_path / "t.csv").write_text("path,x,y,part\na.jpg,1,,fit\nb.jpg,1,0,fit\nc.jpg,0,1,judge\n")
    table = TableSettings(str(tmp_path / "t.csv"), label_columns=("x", "y"), split_column="part")
    fit, judge = prepare_dataset("table", table=table, labels=Labels(many=True))
    assert (fit.split, fit.examples, [name for name, _ in fit.damaged]) == ("fit", 2, ["b.jpg"])
    assert (judge.split, judge.examples, judge.damaged) == ("judge", 1, ())
