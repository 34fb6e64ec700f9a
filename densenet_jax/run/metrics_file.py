"""Reads the reports of a run from `metrics.jsonl`."""

import json
import math
import os
from typing import Any

from densenet_jax.errors import UserError

METRICS_FILE = "metrics.jsonl"
_NAMES = ("loss", "top1", "top5", "f1", "auroc", "average_precision")


def read_metrics(workdir: str) -> list[dict[str, Any]]:
    """Reads every report in `workdir/metrics.jsonl`, oldest first; skips a last line cut short by a kill.

    Raises:
        UserError: a line is not a report.
    """
    path = os.path.join(workdir, METRICS_FILE)
    if not os.path.exists(path):
        return []
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            lines = enumerate(file, start=1)
            return [_parse(line, f"{path} line {number}") for number, line in lines if line.endswith("\n")]
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}; mend or remove it.") from error


def _parse(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
        scores = ("f1",) if "f1" in record and "top1" not in record else ("top1", "top5")  # many labels or one class
        if not {"step", "epoch", "split", "loss", *scores} <= record.keys():
            raise ValueError("step, epoch, split, loss, top1 or top5 is missing")
        record |= {name: math.nan for name in _NAMES if record.get(name, 0) is None}  # JSON has no NaN
        if not isinstance(record["split"], str) or type(record["step"]) is not int:
            raise ValueError("step is not a whole number or split not a text")
        for name, value in record.items():
            if name != "split" and (isinstance(value, bool) or not isinstance(value, int | float | None)):
                raise ValueError(f"{name} is {value!r}, expected a number")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{where} is not a report ({error}); mend or remove that line.") from error
    return record
