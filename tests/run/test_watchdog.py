"""A stall is reported with every thread's stack, and work that goes on is not."""

import math
import re
import threading
import time

import cv2
import numpy as np
import pytest

from densenet_jax.data.pipeline import train_batches
from densenet_jax.data.records import Record
from densenet_jax.data.transforms import train_transform
from densenet_jax.run.watchdog import Watchdog

PICTURE = cv2.imencode(".png", np.zeros((4, 4, 1), np.uint8))[1].tobytes()


class Stalling:
    """Records of which one does not come until it is let go."""

    num_classes, class_names, label_sets, many_labels = 2, ("a", "b"), False, False

    def __init__(self) -> None:
        self.let_go = threading.Event()

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Record:
        if index == 5:
            assert self.let_go.wait(60)
        return Record(image=PICTURE, label=0, name=str(index))


def wait_for(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def transform():
    return train_transform(
        kind="none",
        image_size_px=4,
        channels=1,
        area_range=(1.0, 1.0),
        aspect_range=(1.0, 1.0),
        interpolation="bilinear",
        antialias=True,
    )


def test_a_stalled_pipeline_is_reported_with_the_stack_of_its_thread_and_goes_on(transform, tmp_path, capfd):
    source = Stalling()
    batches = train_batches(source, seed=0, global_batch_size=8, transform=transform)
    with Watchdog(str(tmp_path), 0.2) as watchdog:
        watchdog.begins("waiting for the images of step 1")
        releaser = threading.Thread(
            target=lambda: (wait_for((tmp_path / "stalls.txt").exists), time.sleep(0.3), source.let_go.set())
        )
        releaser.start()
        batch = next(batches)
        watchdog.begins("working")
        releaser.join()
    batches.close()
    assert len(batch["label"]) == 8
    report = (tmp_path / "stalls.txt").read_text()
    assert re.search(r"nothing has moved for \d+ s while waiting for the images of step 1", report)
    assert "is MainThread" in report
    assert "is watchdog" in report
    assert f"{__file__.rsplit('/', 1)[-1]}" in report
    assert "in __getitem__" in report
    assert "in next" in report or "__next__" in report
    errors = capfd.readouterr().err
    assert "The run is not stopped." in errors
    assert "in __getitem__" in errors
    assert "it goes on after" in errors


def test_a_stall_is_reported_again_at_doubled_intervals(tmp_path):
    stalls, start = tmp_path / "stalls.txt", time.monotonic()
    with Watchdog(str(tmp_path), 0.1):
        wait_for(lambda: stalls.exists() and stalls.read_text().count("nothing has moved") >= 3)
        reports = stalls.read_text().count("nothing has moved")
        assert reports <= 1 + math.log2((time.monotonic() - start) / 0.1)


@pytest.mark.parametrize("stall_secs", [30.0, 0.0])
def test_moving_and_unwatched_runs_are_not_reported(stall_secs, tmp_path, capfd):
    with Watchdog(str(tmp_path), stall_secs) as watchdog:
        assert list(watchdog.each(range(3), "evaluating")) == [0, 1, 2]
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr().err == ""


def test_each_item_is_a_sign_of_life(tmp_path):
    with Watchdog(str(tmp_path), 2.0) as watchdog:
        for _ in watchdog.each(range(30), "evaluating"):
            time.sleep(0.1)
    assert not (tmp_path / "stalls.txt").exists()
