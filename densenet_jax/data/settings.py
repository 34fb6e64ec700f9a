"""The settings of `config.data` that describe labels and tables."""

import dataclasses
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Labels:
    """How labels are meant: `config.data.labels`, `uncertain` and `empty`."""

    many: bool = False  # each example has several labels that may be 1, 0 or unknown; else one class
    uncertain: str = "ignore"  # what -1 becomes: "ignore" (unknown), "zero" or "one"
    empty: str = "ignore"  # what an empty value becomes: "ignore" (unknown) or "zero"

    @classmethod
    def from_config(cls, config: Any) -> "Labels":
        """Takes them from the settings."""
        return cls(config.data.labels == "multi", config.data.uncertain, config.data.empty)

    def resolve(self, values: np.ndarray) -> np.ndarray:
        """Converts 1, 0, -1 (uncertain) and NaN (empty) to float32 targets 1, 0 and NaN for unknown."""
        values = np.asarray(values, np.float32)
        becomes = {"ignore": np.float32(np.nan), "zero": np.float32(0), "one": np.float32(1)}
        empty, uncertain = np.isnan(values), values == -1
        return np.where(empty, becomes[self.empty], np.where(uncertain, becomes[self.uncertain], values))


@dataclasses.dataclass(frozen=True)
class TableSettings:
    """The keys of config.data that say what is in a table; configs/default.py describes them."""

    table: str
    image_column: str = "path"
    label_columns: tuple[str, ...] = ()
    label_separator: str = ""
    label_none: str = ""
    split_column: str = ""
    split_lists: tuple[tuple[str, str], ...] = ()
    group_column: str = ""
    train_split: str = "train"
    eval_split: str = "validation"

    @classmethod
    def from_config(cls, config: Any) -> "TableSettings":
        """Takes them from the settings."""
        return cls(
            table=config.data.table,
            image_column=config.data.image_column,
            label_columns=tuple(config.data.label_columns),
            label_separator=config.data.label_separator,
            label_none=config.data.label_none,
            split_column=config.data.split_column,
            split_lists=tuple((split, file) for split, file in config.data.split_lists),
            group_column=config.data.group_column,
            train_split=config.data.train_split,
            eval_split=config.data.eval_split,
        )

    def columns(self) -> list[tuple[str, str]]:
        """Returns pairs of a setting and the column that it names."""
        columns = [("image_column", self.image_column), *(("label_columns", name) for name in self.label_columns)]
        more = [("split_column", self.split_column), ("group_column", self.group_column)]
        return columns + [(key, name) for key, name in more if name]


SINGLE = Labels()
