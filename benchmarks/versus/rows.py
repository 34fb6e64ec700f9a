"""Saves rows as soon as they are measured, and resumes from them."""

from __future__ import annotations

import json
import os
import pathlib
from typing import Any

from versus import report


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
        name = report.device_name(device)
        known, given = {"device": self._device or name} | self.versions, {"device": name} | versions
        if changed := [key for key in given if key in known and known[key] != given[key]]:
            told = "; ".join(f"{key} was {known[key]} and is {given[key]}" for key in changed)
            raise SystemExit(f"error: {self._path} can't be gone on with: {told}")
        self.rows += rows
        self.versions |= versions
        self._device = name
        if self._path:
            report.write(f"{self._path}.part", name, self.versions, self.rows)
            os.replace(f"{self._path}.part", self._path)
