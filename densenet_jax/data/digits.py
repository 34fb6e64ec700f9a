"""Prepares scikit-learn's handwritten digits as a tfds data set: 1,797 real 8x8 images, no download."""

import contextlib
import io
import os
import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from densenet_jax.errors import UserError, report_write_errors
from densenet_jax.system.disk import locked

TEST_EXAMPLES = 360
_SPLIT_SEED = 0  # never changes: the split is part of the data set


class Digits(tfds.core.GeneratorBasedBuilder):
    """8x8 gray digits, scaled to 0..255, in a fixed stratified split of 1,437 for training and 360 for testing."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First version."}  # noqa: RUF012  (tfds's own attribute)

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "image": tfds.features.Image(shape=(8, 8, 1), encoding_format="png"),
            "label": tfds.features.ClassLabel(num_classes=10),
            "file_name": tfds.features.Text(),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description="Handwritten digits of the UCI repository, as scikit-learn ships them.",
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("image", "label"),
            homepage="https://archive.ics.uci.edu/dataset/80",
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager  # nothing is downloaded
        from sklearn.datasets import load_digits

        digits = load_digits()
        test = stratified_test_indices(digits.target, TEST_EXAMPLES)
        splits = {"train": np.setdiff1d(np.arange(len(digits.target)), test), "test": test}
        return {name: self._generate_examples(digits.images, digits.target, part) for name, part in splits.items()}

    def _generate_examples(self, images: np.ndarray, labels: np.ndarray, indices: np.ndarray) -> Iterator[Any]:
        for index in indices:
            name = f"digit_{index:04d}.png"
            file = io.BytesIO()
            Image.fromarray(np.round(images[index] * (255 / 16)).astype(np.uint8)).save(file, "PNG")
            file.seek(0)
            yield name, {"image": file, "label": int(labels[index]), "file_name": name}


def stratified_test_indices(labels: np.ndarray, count: int) -> np.ndarray:
    """Chooses a fixed sample of `count` examples, sorted, with every class at its share (largest remainders first)."""
    classes, sizes = np.unique(labels, return_counts=True)
    quotas = count * sizes / sizes.sum()
    shares = np.floor(quotas).astype(int)
    shares[np.argsort(shares - quotas, kind="stable")[: count - shares.sum()]] += 1
    random = np.random.RandomState(_SPLIT_SEED)  # its stream is frozen by numpy
    chosen = [
        random.permutation(np.flatnonzero(labels == label))[:share]
        for label, share in zip(classes, shares, strict=True)
    ]
    return np.sort(np.concatenate(chosen))


def prepare(directory: str) -> str:
    """Writes the digits below `directory` unless they are there; returns the prepared directory.

    Safe to call from several processes at once; a killed call leaves nothing that looks like the data set.

    Raises:
        UserError: `directory` can't be written.
    """
    path = os.path.join(directory, "digits", "1.0.0")
    if _is_prepared(path):
        return path
    with (
        report_write_errors(f"data set digits in {directory}", "set config.data.dir"),
        locked(os.path.join(os.path.dirname(path), ".lock")),
    ):
        if not _is_prepared(path):
            _write(directory, path)
    return path


def _is_prepared(path: str) -> bool:
    return os.path.exists(os.path.join(path, "dataset_info.json"))


def _write(directory: str, path: str) -> None:
    for leftover in os.scandir(os.path.dirname(path)):
        if leftover.is_dir():  # from a killed run: the lock keeps other writers out
            shutil.rmtree(leftover.path)
    builder = Digits(data_dir=directory, file_format="array_record")
    downloads = os.path.join(os.path.dirname(path), "downloads")
    config = tfds.download.DownloadConfig(try_download_gcs=False)
    # tfds writes to a temporary directory and renames it, so `path` is complete or absent.
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        builder.download_and_prepare(download_dir=downloads, download_config=config)
    shutil.rmtree(downloads, ignore_errors=True)  # empty
    if not _is_prepared(path):
        raise UserError(f"Preparing the digits left nothing in {path}; remove that directory and try again.")
