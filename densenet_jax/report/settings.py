"""Compares the settings of runs as rows of text."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from densenet_jax.config import flatten

_ABSENT = "(absent)"


def every_setting(settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns (key, value) of every setting."""
    return [(f"config.{key}", _text(value)) for key, value in flatten(settings)]


def changed_settings(defaults: Mapping[str, Any], settings: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Returns (key, value, default) of every setting that differs; one that an older run lacks counts as default."""
    rows = different_settings([defaults, settings])
    return [(key, value, default) for key, default, value in rows if value != _ABSENT]


def different_settings(runs: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Returns (key, value in each run ...) of every setting in which the runs differ."""
    flat = [dict(flatten(settings)) for settings in runs]
    keys = dict.fromkeys(key for settings in flat for key in settings)
    rows = []
    for key in keys:
        values = [_text(settings[key]) if key in settings else _ABSENT for settings in flat]
        if len(set(values)) > 1:
            rows.append((f"config.{key}", *values))
    return rows


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
