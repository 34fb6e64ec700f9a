"""Data sets are found, opened and described, or the message says what to do."""

import json
import os
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

from densenet_jax.data.decode import decode_image
from densenet_jax.data.records import DamagedImage
from densenet_jax.data.sources import open_source
from densenet_jax.data.tfds_source import default_directory, find_prepared
from densenet_jax.errors import UserError
from tests.data import fake_imagenet


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    directory = str(tmp_path_factory.mktemp("data"))
    fake_imagenet.write(directory, train=21, validation=5, num_classes=12)
    return directory


def test_an_imagenet_of_photographs(imagenet):
    source = open_source("imagenet2012", imagenet, "train")
    assert len(source) == 21
    assert source.num_classes == 12
    assert source.class_names[3] == "n00000003"
    record = source[13]
    assert (record.label, record.name) == (1, "train_13.JPEG")
    assert record.image == fake_imagenet.jpeg(13)
    np.testing.assert_array_equal(source.labels(), np.arange(21) % 4)
    assert open_source("imagenet2012", imagenet, "validation")[4].name == "validation_4.JPEG"


def test_slices_of_splits(imagenet):
    source = open_source("imagenet2012", imagenet, "train[5:8]")
    assert [source[index].name for index in range(len(source))] == [f"train_{index}.JPEG" for index in (5, 6, 7)]


@pytest.mark.parametrize(("holdout", "count"), [(5, 5), (0.25, 5), (1, 1)])
def test_a_held_out_part_and_the_rest_are_the_whole(imagenet, holdout, count):
    rest = open_source("imagenet2012", imagenet, "train", holdout=holdout)
    part = open_source("imagenet2012", imagenet, "holdout", holdout=holdout)
    assert (len(part), len(rest)) == (count, 21 - count)
    names = [source[index].name for source in (part, rest) for index in range(len(source))]
    assert sorted(names) == sorted(f"train_{index}.JPEG" for index in range(21))
    again = open_source("imagenet2012", imagenet, "holdout", holdout=holdout)
    assert [again[index].name for index in range(count)] == names[:count]
    assert part.num_classes == 12
    np.testing.assert_array_equal(part.labels(), [part[index].label for index in range(count)])
    assert len(open_source("imagenet2012", imagenet, "validation", holdout=holdout)) == 5


def test_larger_parts_contain_smaller_ones(imagenet):
    small, large = (open_source("imagenet2012", imagenet, "holdout", holdout=count) for count in (4, 9))
    assert {small[index].name for index in range(4)} < {large[index].name for index in range(9)}


@pytest.mark.parametrize("holdout", [-1, 21, 0.999, 0.001])
def test_a_wrong_holdout_is_named(imagenet, holdout):
    with pytest.raises(UserError, match="holdout"):
        open_source("imagenet2012", imagenet, "train", holdout=holdout)


def test_holdout_needs_a_part(imagenet):
    with pytest.raises(UserError, match="holdout"):
        open_source("imagenet2012", imagenet, "holdout")


def test_an_unprepared_imagenet_says_what_to_do(tmp_path):
    with pytest.raises(UserError) as caught:
        open_source("imagenet2012", str(tmp_path), "train")
    message = str(caught.value)
    assert "\n" not in message
    for part in (
        "ILSVRC2012_img_train.tar",
        "ILSVRC2012_img_val.tar",
        "image-net.org",
        str(tmp_path / "downloads" / "manual"),
        "pip install tensorflow-cpu==2.21.0",
        "python main.py --mode prepare",
    ):
        assert part in message


def test_another_unprepared_set_says_what_to_do(tmp_path):
    with pytest.raises(UserError, match=r"cifar10 is not prepared in .*--mode prepare"):
        open_source("cifar10", str(tmp_path), "train")
    with pytest.raises(UserError, match="not/a/name"):
        open_source("not/a/name", str(tmp_path), "train")


def test_an_unknown_split_names_the_known_ones(imagenet):
    with pytest.raises(UserError, match="'val'; it has train, validation"):
        open_source("imagenet2012", imagenet, "val")
    with pytest.raises(UserError, match=r"no examples|can't be opened"):
        open_source("imagenet2012", imagenet, "train[3:3]")


def test_a_set_without_random_access_is_to_be_converted(tmp_path):
    path = fake_imagenet.write(str(tmp_path), train=3, validation=1)
    info = os.path.join(path, "dataset_info.json")
    with open(info, encoding="utf-8") as file:
        content = json.load(file) | {"fileFormat": "tfrecord"}
    with open(info, "w", encoding="utf-8") as file:
        json.dump(content, file)
    with pytest.raises(UserError, match=r"tfrecord.*--mode prepare"):
        open_source("imagenet2012", str(tmp_path), "train")


def _decode_all(source):
    for index in range(len(source)):
        decode_image(source[index].image, name=source[index].name)


def test_missing_and_broken_files(tmp_path):
    path = fake_imagenet.write(str(tmp_path), train=6, validation=2)
    os.rename(os.path.join(path, "features.json"), os.path.join(path, "away"))
    with pytest.raises(UserError, match="can't be read as a tfds data set"):
        open_source("imagenet2012", str(tmp_path), "train")
    os.rename(os.path.join(path, "away"), os.path.join(path, "features.json"))
    shard = os.path.join(path, "imagenet2012-train.array_record-00001-of-00002")
    with open(shard, "r+b") as file:
        file.seek(2**16)  # in the second block: the first has the file's own description
        file.write(bytes(60_000))
    source = open_source("imagenet2012", str(tmp_path), "train")
    with pytest.raises(DamagedImage, match=r"train/|train_"):
        _decode_all(source)
    os.remove(shard)
    with pytest.raises(UserError, match=r"1 files? (is|are) missing"):
        open_source("imagenet2012", str(tmp_path), "train")


def test_the_newest_version_with_random_access_is_found(tmp_path):
    for version, kind in (
        ("5.0.0", "array_record"),
        ("5.1.0", "array_record"),
        ("5.2.0", "tfrecord"),
        ("12.0.0", "tfrecord"),
    ):
        (tmp_path / "imagenet2012" / version).mkdir(parents=True)
        (tmp_path / "imagenet2012" / version / "dataset_info.json").write_text(json.dumps({"fileFormat": kind}))
    (tmp_path / "imagenet2012" / "6.0.0").mkdir()  # half prepared
    assert find_prepared("imagenet2012", str(tmp_path)).endswith("5.1.0")
    assert find_prepared("imagenet2012:5.0.0", str(tmp_path)).endswith("5.0.0")
    assert find_prepared("imagenet2012:12.0.0", str(tmp_path)).endswith("12.0.0")


def test_sets_that_are_no_image_classification_are_refused(tmp_path):
    path = fake_imagenet.write(str(tmp_path), train=2, validation=2)
    tfds.features.FeaturesDict({"left": tfds.features.Image(), "right": tfds.features.Image()}).save_config(path)
    with pytest.raises(UserError, match="expects one image and one class label"):
        open_source("imagenet2012", str(tmp_path), "train")


def test_a_missing_storage_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(UserError, match=r"s3://bucket/data can't be read: .*s3fs"):
        open_source("imagenet2012", "s3://bucket/data", "train")


def test_the_directory_is_tfds_own_by_default(monkeypatch, tmp_path):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    assert default_directory() == str(tmp_path)
    fake_imagenet.write(str(tmp_path), train=2, validation=2)
    assert len(open_source("imagenet2012", "", "train")) == 2
    monkeypatch.delenv("TFDS_DATA_DIR")
    assert default_directory() == os.path.expanduser("~/tensorflow_datasets")
