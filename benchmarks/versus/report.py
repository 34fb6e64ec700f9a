"""Formats figures with their spread as a table, and saves rows as soon as they are measured, to be resumed from."""

from __future__ import annotations

import datetime
import json
import os
import pathlib
import platform
import statistics
from typing import Any


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Returns lower quartile, median and upper quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def percentile(values: list[float], share: float) -> float:
    """Returns the value that a `share` of all values does not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, round(share * len(ordered) + 0.5) - 1))]


def device_name(reported: str) -> str:
    """Returns the accelerator's own name, or the processor's, its generation and its number of cores."""
    if reported.lower() != "cpu":
        return reported
    name = platform.processor() or platform.machine()
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\n\n")[0].splitlines()
        fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
        name = fields.get("model name", name)
        if {"cpu family", "model"} <= fields.keys():  # one name may stand for many generations
            name += f" (family {fields['cpu family']}, model {fields['model']})"
    except OSError:
        pass
    return f"{name}, {len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} cores"


def write(path: str, device: str, versions: dict[str, str], rows: list[dict[str, Any]]) -> None:
    """Writes the JSON file of one run."""
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    content = {"date": date, "device": device, "versions": versions, "rows": rows}
    pathlib.Path(path).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def table(rows: list[dict[str, Any]], columns: dict[str, str]) -> str:
    """Formats rows as text; columns maps a key to its heading."""
    cells = [list(columns.values()), *[[_cell(row.get(key)) for key in columns] for row in rows]]
    widths = [max(len(line[index]) for line in cells) for index in range(len(columns))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:,.1f}" if isinstance(value, float) else str(value)


class Rows:
    """The rows of one run, written after every addition where there is a path.

    Attributes:
        versions: of the libraries that made the rows.
    """

    def __init__(self, path: str | None, resume: bool) -> None:
        """Starts with the rows of the file at `path` when resuming."""
        self._path = path
        self._device: str | None = None
        self.rows: list[dict[str, Any]] = []
        self.versions: dict[str, str] = {}
        if resume and path and os.path.exists(path):
            content = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
            self.rows, self.versions, self._device = content["rows"], content["versions"], content["device"]

    def has(self, **values: Any) -> bool:
        """Whether there is a row with these values."""
        return any(all(row.get(key) == value for key, value in values.items()) for row in self.rows)

    def add(self, rows: list[dict[str, Any]], versions: dict[str, str], device: str) -> None:
        """Adds rows; exits if they are of another device or other versions than the table's."""
        name = device_name(device)
        known, given = {"device": self._device or name} | self.versions, {"device": name} | versions
        if changed := [key for key in given if key in known and known[key] != given[key]]:
            changes = "; ".join(f"{key} was {known[key]} and is {given[key]}" for key in changed)
            raise SystemExit(f"error: {self._path} can't be gone on with: {changes}")
        self.rows += rows
        self.versions |= versions
        self._device = name
        if self._path:
            write(f"{self._path}.part", name, self.versions, self.rows)
            os.replace(f"{self._path}.part", self._path)
