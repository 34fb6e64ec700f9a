"""The calibration of a run: a file in its work directory, bound to one checkpoint."""

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from densenet_jax.errors import UserError, first_line, report_write_errors
from densenet_jax.training.integrity import weights_digest
from densenet_jax.workdir import to_json, write_json

logger = logging.getLogger(__name__)
CALIBRATION_FILE = "calibration.json"


class Calibration(NamedTuple):
    """Temperatures by which logits are divided, and thresholds of the probabilities after that."""

    temperatures: tuple[float, ...]  # one for all classes, or one a label
    thresholds: tuple[float, ...] = ()  # one a label, NaN where unknown; () for one class an image
    content: Mapping[str, Any] = {}  # the whole file, for the report

    @classmethod
    def from_thresholds(cls, thresholds: tuple[float, ...], classes: int, source: str) -> "Calibration | None":
        """Makes a calibration of the thresholds that a file of weights brings along; None for ().

        Raises:
            UserError: there is not one a label, or one is no probability.
        """
        if thresholds and (len(thresholds) != classes or any(value < 0 or value > 1 for value in thresholds)):
            raise UserError(
                f"{source} has {len(thresholds)} thresholds (op_threshs), from {np.nanmin(thresholds):g} to "
                f"{np.nanmax(thresholds):g}; expected {classes}, each from 0 to 1 or NaN, or none."
            )
        return cls((1.0,), thresholds) if thresholds else None

    def describe(self) -> str:
        """Returns a few words, such as "calibrated (temperature 1.306)"."""
        if not self.content:
            return "with its own thresholds"
        low, high = min(self.temperatures), max(self.temperatures)
        return f"calibrated (temperature {low:.4g})" if low == high else f"calibrated ({low:.4g} to {high:.4g})"

    def scale(self, variables: dict[str, Any]) -> dict[str, Any]:
        """Divides the logits by the temperatures, in the classifier's weights, so that every use of them has it."""
        classifier = variables["params"]["classifier"]
        inverse = (1 / np.asarray(self.temperatures, np.float64)).astype(np.float32)
        scaled = {
            name: leaf * inverse.astype(leaf.dtype).reshape(*[1] * (leaf.ndim - 1), -1)
            for name, leaf in classifier.items()
        }
        return {**variables, "params": {**variables["params"], "classifier": scaled}}


def calibration_path(workdir: str) -> str:
    """Returns the path of a run's calibration."""
    return os.path.join(workdir, CALIBRATION_FILE)


def write_calibration(workdir: str, step: int, content: Mapping[str, Any]) -> str:
    """Writes a calibration of the checkpoint of `step` and returns the file's path.

    Args:
        content: "temperatures", "thresholds", and whatever else a person may want to know.

    Raises:
        UserError: the file can't be written.
    """
    path = calibration_path(workdir)
    content = {"step": step, "weights": _digest(workdir, step), **content}
    with report_write_errors(path, "make room or mend its rights"):
        write_json(path, {**content, "checksum": _checksum(content)})
    return path


def read_calibration(workdir: str, step: int, classes: int) -> Calibration | None:
    """Reads the calibration of a checkpoint; None if there is none, with a warning if it is of another checkpoint.

    Raises:
        UserError: the file is not as it was written, or has another number of labels.
    """
    path = calibration_path(workdir)
    if not os.path.exists(path):
        return None
    again = "run --mode calibrate again, or remove it"
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
        checksum = content.pop("checksum")
        temperatures, thresholds = content["temperatures"], content["thresholds"]
        if checksum != _checksum(content):
            raise ValueError("it was changed after it was written")
        thresholds = tuple(float("nan") if value is None else float(value) for value in thresholds)
        calibration = Calibration(tuple(map(float, temperatures)), thresholds, content)
        if len(temperatures) not in (1, classes) or len(thresholds) not in (0, classes):
            raise ValueError(f"it has {len(temperatures)} temperatures, the model {classes} classes")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path} can't be used ({first_line(error)}); {again}.") from error
    if content["step"] != step:
        logger.warning("%s is of step %s, not %d, and is not used; %s.", path, content["step"], step, again)
        return None
    if content["weights"] != _digest(workdir, step):
        logger.warning("%s is of other weights than those of step %d here, and is not used; %s.", path, step, again)
        return None
    return calibration


def _digest(workdir: str, step: int) -> str:
    return weights_digest(os.path.join(workdir, "checkpoints", str(step)))


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(to_json(content, sort_keys=True).encode()).hexdigest()
