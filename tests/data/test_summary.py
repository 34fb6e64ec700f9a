"""The page about a data set tells the truth about it."""

import io

import numpy as np
import pytest
from PIL import Image

from densenet_jax.data import summary
from densenet_jax.data.pipeline import eval_batches, train_batches
from densenet_jax.data.settings import Labels, TableSettings
from densenet_jax.data.sources import open_source
from densenet_jax.data.transforms import eval_transform, train_transform
from densenet_jax.report.data import _labels_section
from tests.data import fake_imagenet


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    directory = str(tmp_path_factory.mktemp("data"))
    replace = {"train_5.JPEG": b"broken"}
    fake_imagenet.write(directory, train=30, validation=3, num_classes=6, used_classes=4, replace=replace)
    return open_source("imagenet2012", directory, "train")


def test_a_split_in_numbers(source):
    actual = summary.summarize(source)
    assert actual.examples == 30
    np.testing.assert_array_equal(actual.class_counts, [8, 8, 7, 7, 0, 0])
    assert actual.damaged == ("train_5.JPEG",)
    first = Image.open(io.BytesIO(fake_imagenet.jpeg(0)))
    assert (actual.widths[0], actual.heights[0]) == first.size
    assert len(actual.widths) == 29
    assert 90 <= actual.widths.min() <= actual.widths.max() < 140


def test_large_splits_are_sampled(source):
    assert len(summary.summarize(source, sample=7).widths) in (6, 7)


def test_speed_is_measured_for_endless_and_short_batches(source):
    train = train_batches(
        source, seed=0, global_batch_size=8, transform=train_transform(image_size_px=16), on_damaged="skip"
    )
    assert summary.measure_speed(train, seconds=0.2) > 8
    once = eval_batches(
        source, global_batch_size=8, transform=eval_transform(image_size_px=16, resize_px=16), on_damaged="skip"
    )
    assert summary.measure_speed(once, seconds=100) > 8


def test_many_labels_are_counted_alone_and_together(tmp_path):
    values = [("1", "1", ""), ("1", "0", "-1"), ("0", "", "1"), ("1", "1", "1")]
    rows = [f"{i}.png,{i // 2},{','.join(value)}\n" for i, value in enumerate(values)]
    for i in range(4):
        Image.fromarray(np.full((4, 6), i, np.uint8)).save(tmp_path / f"{i}.png")
    (tmp_path / "t.csv").write_text("path,who,a,b,c\n" + "".join(rows))
    table = TableSettings(str(tmp_path / "t.csv"), label_columns=("a", "b", "c"), group_column="who")
    actual = summary.summarize(open_source("table", table=table, labels=Labels(many=True)))
    np.testing.assert_array_equal(actual.class_counts, [3, 2, 2])
    np.testing.assert_array_equal(actual.unknown, [0, 1, 2])
    np.testing.assert_array_equal(actual.together, [[3, 2, 1], [2, 2, 1], [1, 1, 2]])
    assert actual.groups == 2
    (section,), (chart,) = _labels_section({"train": actual}, ("a", "b", "c"))
    assert "<td>b</td>" in section.replace(' class="number"', "")
    assert "66.7%" in section
    assert chart.png[:4] == b"\x89PNG" != chart.dark_png
