"""tfds sets with many labels an image, whatever feature holds them."""

import numpy as np
import pytest
import tensorflow_datasets as tfds

from densenet_jax.data.records import DamagedImage
from densenet_jax.data.settings import Labels
from densenet_jax.data.sources import open_source
from densenet_jax.errors import UserError
from tests.data import fake_imagenet

F, NAN = tfds.features, np.nan
STATES = F.ClassLabel(names=["uncertain", "positive", "negative", "unmentioned"])
OBJECTS = F.Sequence({"bbox": F.BBoxFeature(), "label": F.ClassLabel(names=["cat", "dog", "cow"])})
BOX = F.BBox(0.0, 0.0, 1.0, 1.0)
CHEXPERT = ["positive", "negative", "uncertain", "unmentioned"]


@pytest.mark.parametrize(
    ("features", "answers", "names", "expected"),
    [
        (
            {"label": F.Sequence(STATES), "image_view": F.ClassLabel(names=["frontal", "lateral"])},
            [{"label": CHEXPERT + ["negative"] * 10, "image_view": "frontal"}] * 2,
            ("No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity"),
            [1, 0, 0, NAN],
        ),
        (
            {"attributes": {"Smiling": np.bool_, "Bald": np.bool_}},
            [{"attributes": {"Smiling": True, "Bald": False}}] * 2,
            ("Bald", "Smiling"),
            [0, 1],
        ),
        (
            {"image/filename": F.Text(), "objects": OBJECTS},
            [{"image/filename": "a", "objects": [{"bbox": BOX, "label": name} for name in ("cow", "cat", "cow")]}] * 2,
            ("cat", "dog", "cow"),
            [1, 0, 1],
        ),
        ({"tags": F.Sequence(F.ClassLabel(names=["a", "b"]))}, [{"tags": []}] * 2, ("a", "b"), [0, 0]),
        (
            {"labels": F.Tensor(shape=(3,), dtype=np.float32)},
            [{"labels": np.float32([1, -1, NAN])}] * 2,
            ("0", "1", "2"),
            [1, 0, NAN],
        ),
    ],
)
def test_labels_are_found_by_their_feature(tmp_path, features, answers, names, expected):
    fake_imagenet.write_features(str(tmp_path), "tags", features, answers)
    source = open_source("tags", str(tmp_path), labels=Labels(many=True, uncertain="zero"))
    assert source.many_labels
    assert not source.label_sets
    assert source.class_names[: len(names)] == names
    assert source[0].label.dtype == source.labels().dtype == np.float32
    np.testing.assert_array_equal(source[1].label[: len(expected)], np.float32(expected))
    assert source.labels().shape == (2, source.num_classes)


def test_other_features_are_refused_in_one_line(tmp_path):
    fake_imagenet.write_features(str(tmp_path), "tags", {"label": F.ClassLabel(num_classes=2)}, [{"label": 1}] * 2)
    with pytest.raises(UserError, match=r"has the features image, label; config.data.labels=multi expects one image"):
        open_source("tags", str(tmp_path), labels=Labels(many=True))
    vector = {"labels": F.Tensor(shape=(3,), dtype=np.float32)}
    fake_imagenet.write_features(str(tmp_path), "odd", vector, [{"labels": np.float32([1, 7, 0])}] * 2)
    with pytest.raises(UserError, match=r"config.data.labels=single expects one image and one class label"):
        open_source("odd", str(tmp_path))
    with pytest.raises(DamagedImage, match="labels"):
        open_source("odd", str(tmp_path), labels=Labels(many=True))[0]
