"""Formats figures with their spread as a table and a JSON file."""

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


def device_name(told: str) -> str:
    """Returns the accelerator's own name, or the processor and its number of cores."""
    if told.lower() != "cpu":
        return told
    name = platform.processor() or platform.machine()
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
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
