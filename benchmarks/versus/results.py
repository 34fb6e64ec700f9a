"""Reads result files: ratios to other implementations with their spread, what fell since the last, and growth."""

from __future__ import annotations

import json
import pathlib
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

OURS = ("densenet_jax", "jax", "batched", "kernel")
WHO = ("implementation", "runtime", "pipeline", "batches", "form")  # the key that names an implementation
CASE = (
    *("model", "mode", "operation", "rows", "channels", "protocol", "clients", "target", "cores", "threads"),
    *("antialias", "image_size_px", "batch_size", "dtype"),
)
GROWTH = {"layers": "layers", "image_size_px": "image size, px", "batch_size": "batch size"}
_DEEPENED = re.compile(r"densenet(121|169|201|264)")  # the networks that differ in depth alone

Case = tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Results:
    """One result file."""

    path: pathlib.Path
    date: str
    device: str
    rows: Sequence[Mapping[str, Any]]

    @property
    def benchmark(self) -> str:
        """The start of the file's name, which names its program."""
        programs = ("train_step", "latency", "serving", "input_pipeline", "traffic", "kernels")
        return next((name for name in programs if self.path.name.startswith(name)), self.path.stem)


@dataclass(frozen=True)
class Ratio:
    """How many times as good as another implementation this project is on one case, and between which quartiles.

    Attributes:
        against: the other implementation.
        low, high: the worse quartile of this project by the better one of the other, and the reverse.
    """

    benchmark: str
    device: str
    date: str
    case: Case
    against: str
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Growth:
    """One quantity of several implementations over layers, image size or batch size, all else being equal."""

    results: Results
    axis: str
    quantity: str
    case: Case
    lines: dict[str, list[tuple[float, float]]]

    @property
    def count(self) -> int:
        """Number of points."""
        return sum(map(len, self.lines.values()))


def read_results(directory: pathlib.Path) -> tuple[list[Results], list[str]]:
    """Reads all result files, oldest first, and returns with them a line about each file that is none."""
    read, faults = [], []
    for path in sorted(directory.glob("*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            rows = [{"model": content["model"], **row} if "model" in content else row for row in content["rows"]]
            read.append(Results(path, content["date"], content["device"], rows))
        except (OSError, ValueError, KeyError, TypeError) as error:
            faults.append(f"{path} is left out: not a result file ({type(error).__name__}: {error})")
    return sorted(read, key=lambda one: one.date), faults


def name_of(row: Mapping[str, Any]) -> str:
    """Returns the implementation that a row is about; "" if it names none."""
    return next((str(row[key]) for key in WHO if key in row), "")


def goodness(row: Mapping[str, Any]) -> tuple[float, float, float] | None:
    """Returns (lower, middle, upper) of a row's figure, larger being better; None if it has none."""
    middle = next((row[key] for key in ("images_per_sec", "requests_per_sec") if row.get(key)), None)
    spread = next((row[key] for key in ("quartiles", "p50_quartiles_over_turns") if row.get(key)), None)
    if middle:
        low, high = spread or (row.get("lowest", middle), row.get("highest", middle))
        return low, middle, high
    less = row.get("p50") or row.get("bytes_per_image") or row.get("microseconds")
    if not less:
        return None
    fast, slow = spread or (less, less)
    return 1 / max(slow, less), 1 / less, 1 / min(fast, less)


def case_of(row: Mapping[str, Any], without: Sequence[str] = ()) -> Case:
    """Returns what an implementation had to do in a row."""
    return tuple((key, row[key]) for key in CASE if key in row and key not in without)


def ratios(results: Iterable[Results]) -> list[Ratio]:
    """Compares this project with each other implementation on each case of each file."""
    made = []
    for one in results:
        cases: dict[Case, dict[str, tuple[float, float, float]]] = defaultdict(dict)
        for row in one.rows:
            if (figure := goodness(row)) and (name := name_of(row)):
                cases[case_of(row)][name] = figure
        for case, figures in cases.items():
            ours = next((figures[name] for name in OURS if name in figures), None)
            for name, (low, middle, high) in figures.items():
                if ours and name not in OURS:
                    values = ours[1] / middle, ours[0] / high, ours[2] / low
                    made.append(Ratio(one.benchmark, one.device, one.date, case, name, *values))
    return made


def newest(every: Iterable[Ratio]) -> list[tuple[Ratio, Ratio | None]]:
    """Pairs the newest ratio of each case on each kind of machine with the one before."""
    series: dict[Any, list[Ratio]] = defaultdict(list)
    for one in sorted(every, key=lambda one: one.date):
        series[one.benchmark, one.device, one.case, one.against].append(one)
    return [(found[-1], found[-2] if len(found) > 1 else None) for found in series.values()]


def falls(every: Iterable[Ratio]) -> list[tuple[Ratio, Ratio]]:
    """Returns (now, before) where a ratio fell by more than the wider of the two spreads."""
    return [
        (now, before)
        for now, before in newest(every)
        if before and before.value - now.value > max(now.high - now.low, before.high - before.low)
    ]


def describe(case: Case, without: Sequence[str] = ()) -> str:
    """Says a case in a few words."""
    units = {"batch_size": "batch {}", "image_size_px": "{} px"}
    units |= {key: f"{key} {{}}" for key in ("clients", "cores", "threads", "antialias", "rows", "channels")}
    parts = [units.get(key, "{}").format(value) for key, value in case if key not in without and value != 0]
    return ", ".join(parts)


def growths(one: Results) -> Iterator[Growth]:
    """Yields every quantity that a file has for three or more depths, sizes or batches of the same case."""
    rows = [dict(row) for row in one.rows]
    for row in rows:
        if depth := _DEEPENED.fullmatch(str(row.get("model"))):
            row["layers"] = int(depth[1])
    for axis in GROWTH:
        fixed = ("model",) if axis == "layers" else (axis,)
        cases: dict[tuple[str, Case], dict[str, list[tuple[float, float]]]] = defaultdict(dict)
        for row in rows:
            if row.get(axis):
                for quantity, value in quantities(row):
                    lines = cases[quantity, case_of(row, fixed)]
                    lines.setdefault(name_of(row), []).append((row[axis], value))
        for (quantity, case), lines in cases.items():
            if max(len({x for x, _ in line}) for line in lines.values()) >= 3:
                yield Growth(one, axis, quantity, case, {name: sorted(line) for name, line in lines.items()})


def quantities(row: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yields a row's quantities of which growth tells something, with their names."""
    if row.get("images_per_sec") and "batch_size" in row:
        yield "images/s", row["images_per_sec"]
    if row.get("p50"):
        yield "images/s", 1000 * row["batch_size"] / row["p50"]
    if row.get("peak_bytes"):
        yield "peak memory, MiB", row["peak_bytes"] / 2**20
    if row.get("bytes_per_image"):
        yield "moved per image, MB", row["bytes_per_image"] / 1e6
    if row.get("temp_bytes") and "bytes_per_image" in row:
        yield "temporaries, GB", row["temp_bytes"] / 1e9
