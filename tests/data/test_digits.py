"""The digits are a real tfds data set, whole or absent whatever happens while they are prepared."""

import multiprocessing
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from sklearn.datasets import load_digits

from densenet_jax.data import digits
from densenet_jax.data.decode import decode_image
from densenet_jax.data.sources import open_source
from densenet_jax.errors import UserError


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return str(tmp_path_factory.mktemp("data"))


def test_all_images_with_their_labels_in_two_splits(directory):
    original = load_digits()
    seen = {}
    for split, count in (("train", 1437), ("test", 360)):
        source = open_source("digits", directory, split)
        assert len(source) == count
        assert source.num_classes == 10
        for index in range(count):
            record = source[index]
            number = int(record.name[len("digit_") : -len(".png")])
            pixels = decode_image(record.image, 1)[:, :, 0]
            assert record.label == original.target[number]
            np.testing.assert_array_equal(pixels, np.round(original.images[number] * 255 / 16))
            seen[number] = split
    assert sorted(seen) == list(range(1797))


def test_the_split_is_stratified_and_fixed(directory):
    whole = np.bincount(load_digits().target)
    source = open_source("digits", directory, "test")
    counts = np.bincount(source.labels())
    assert np.abs(counts - whole * 360 / 1797).max() < 1
    assert [source[index].name for index in range(3)] == ["digit_1658.png", "digit_1622.png", "digit_1796.png"]


def test_tfds_itself_reads_it(directory):
    builder = tfds.builder_from_directory(digits.prepare(directory))
    assert builder.name == "digits"
    example = builder.as_data_source("test")[0]
    assert example["image"].shape == (8, 8, 1)
    assert not any(name.split(".")[0] == "tensorflow" for name in sys.modules)


def test_the_second_call_writes_nothing(directory):
    path = digits.prepare(directory)
    before = {entry.name: entry.stat().st_mtime_ns for entry in os.scandir(path)}
    assert digits.prepare(directory) == path
    assert {entry.name: entry.stat().st_mtime_ns for entry in os.scandir(path)} == before


def test_two_processes_at_once(tmp_path):
    context = multiprocessing.get_context("spawn")
    with context.Pool(2) as pool:
        paths = pool.map(digits.prepare, [str(tmp_path)] * 2, chunksize=1)
    assert paths[0] == paths[1]
    assert sorted(os.listdir(tmp_path / "digits")) == [".lock", "1.0.0"]
    assert len(open_source("digits", str(tmp_path), "train")) == 1437


def test_a_kill_leaves_nothing_that_is_taken_for_the_data_set(tmp_path):
    code = (
        "import sys, os, signal\n"
        "from densenet_jax.data import digits\n"
        "inner = digits.Digits._generate_examples\n"
        "def dying(self, images, labels, indices):\n"
        "    for count, entry in enumerate(inner(self, images, labels, indices)):\n"
        "        if count == 100: os.kill(os.getpid(), signal.SIGKILL)\n"
        "        yield entry\n"
        "digits.Digits._generate_examples = dying\n"
        f"digits.prepare({str(tmp_path)!r})\n"
    )
    result = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, timeout=60)
    assert result.returncode == -signal.SIGKILL, result.stderr.decode()
    assert not (tmp_path / "digits" / "1.0.0").exists()
    assert len(open_source("digits", str(tmp_path), "test")) == 360
    assert sorted(os.listdir(tmp_path / "digits")) == [".lock", "1.0.0"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_that_can_not_be_written(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match=r"can't be written.*config\.data\.dir"):
        digits.prepare(str(tmp_path))


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "digits").write_text("")
    with pytest.raises(UserError, match=r"can't be written.*config\.data\.dir"):
        digits.prepare(str(tmp_path))
