"""Reports in metrics.jsonl and in TensorBoard's files."""

import io
import json
import resource

import numpy as np
import pytest
from PIL import Image

from densenet_jax.errors import UserError
from densenet_jax.run.metric_writers import Writers
from densenet_jax.run.metrics_file import read_metrics

FIGURES = {"epoch": 0.5, "loss": 1.0, "top1": 0.5, "top5": 1.0}


def test_a_work_directory_that_is_gone_is_reported_at_the_next_report(tmp_path):
    (tmp_path / "run").mkdir()
    writers = Writers(str(tmp_path / "run"))
    writers.write(5, "train", FIGURES)
    (tmp_path / "run").rename(tmp_path / "moved")
    with pytest.raises(UserError, match=r"run was removed during the run; bring it back"):
        writers.write(6, "train", FIGURES)
    writers.close()
    assert [each["step"] for each in read_metrics(str(tmp_path / "moved"))] == [5]


@pytest.mark.parametrize("channels", [1, 3])
def test_tensorboard_shows_settings_and_images(channels, tmp_path):
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator

    images = np.arange(2 * 4 * 6 * channels, dtype=np.uint8).reshape(2, 4, 6, channels)
    writers = Writers(str(tmp_path))
    writers.describe([("data.name", "<digits>"), ("seed", 3)], images, ["one", "two"])
    writers.write(5, "train", FIGURES)
    writers.close()

    events = EventAccumulator(str(tmp_path)).Reload()
    kinds = {tag: events.SummaryMetadata(tag).plugin_data.plugin_name for tag in events.Tags()["tensors"]}
    assert kinds["settings"] == "text"
    assert kinds["augmented/02"] == "images"
    assert kinds["train/loss"] == "scalars"
    assert events.SummaryMetadata("augmented/02").summary_description == "two"
    (text,) = events.Tensors("settings")[0].tensor_proto.string_val
    assert text == b"    data.name = <digits>\n    seed = 3"  # indented: Markdown shows it as it stands
    width, height, png = events.Tensors("augmented/02")[0].tensor_proto.string_val
    assert (width, height) == (b"6", b"4")
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(png))).reshape(4, 6, channels), images[1])


def test_full_disk_is_a_users_error(tmp_path):
    """A limit on the size of files stands for the disk; the soft one can be lifted again."""
    writers = Writers(str(tmp_path))
    writers.write(5, "train", FIGURES)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, before[1]))
    try:
        with pytest.raises(UserError, match=r"can't be written to: File too large \(.* MiB are free there\)"):
            writers.describe([("key", "x" * 1000)], np.zeros((0, 1, 1, 1), np.uint8), [])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    writers.close()
    assert read_metrics(str(tmp_path))[0]["step"] == 5


def test_reports_come_back_but_for_a_line_cut_short(tmp_path):
    assert read_metrics(str(tmp_path)) == []
    writers = Writers(str(tmp_path))
    writers.write(5, "train", FIGURES)
    writers.close()
    with open(tmp_path / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 6, "spl')
    assert read_metrics(str(tmp_path)) == [{"step": 5, "split": "train", **FIGURES}]
    with open(tmp_path / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write("\n")
    with pytest.raises(UserError, match=r"metrics.jsonl line 2 is not a report"):
        read_metrics(str(tmp_path))


@pytest.mark.parametrize(
    "change",
    [
        {"step": "5"},
        {"step": True},
        {"split": 3},
        {"loss": [1]},
        {"top1": "0.5"},
        {"learning_rate": {}},
        {"top5": True},
    ],
)
def test_a_value_of_a_wrong_type_is_one_line(change, tmp_path):
    report = {"step": 5, "split": "train", **FIGURES, "compile_secs": None} | change
    (tmp_path / "metrics.jsonl").write_text(json.dumps(report) + "\n")
    with pytest.raises(UserError, match=r"metrics.jsonl line 1 is not a report .*mend or remove that line") as caught:
        read_metrics(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_folder_in_place_of_the_reports_is_one_line(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match="can't be read: Is a directory"):
        read_metrics(str(tmp_path))
