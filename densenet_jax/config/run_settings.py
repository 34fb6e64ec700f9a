"""Reads the settings of the run in a work directory, and compares them with others. Loads no JAX."""

import json
import os
from collections.abc import Mapping
from typing import Any

import ml_collections

from densenet_jax.config import recipes
from densenet_jax.config.rules import check_config, flatten, to_dict
from densenet_jax.errors import UserError, first_line

# A run may be continued with other values of these: they change where or how fast it computes, not what.
MAY_CHANGE_ON_RESUME = (
    "model.dtype",
    "model.remat",
    "model.block_form",
    "model.kernels",
    "data.dir",
    "data.table",  # rows are compared with the checkpoint's
    "data.allow_changed",
    "data.class_order",  # class names are compared with the checkpoint's
    "data.reader_threads",
    "data.prefetch_batches",
    "train.log_every_steps",
    "train.stall_secs",
    "train.patience_epochs",
    "profile",
    "train.sharding",
    "eval.",
    "checkpoint.",
    "serve.",
)


def started_from(workdir: str, pretrained: str) -> bool:
    """Returns whether the run in `workdir` began with these pretrained weights, so its checkpoints continue them."""
    try:
        with open(os.path.join(workdir, "config.json"), encoding="utf-8") as file:
            return json.load(file)["model"]["pretrained"] == pretrained
    except (OSError, ValueError, LookupError, TypeError):
        return False


def read_settings(workdir: str) -> dict[str, Any]:
    """Reads the resolved settings of the run in `workdir`.

    Raises:
        UserError: there is no run, or its `config.json` can't be read.
    """
    path = os.path.join(workdir, "config.json")
    if not os.path.exists(path):
        raise UserError(
            f"{workdir} is not a run's directory: it has no config.json; train there first or name another."
        )
    try:
        with open(path, encoding="utf-8") as file:
            stored = json.load(file)
        if not isinstance(stored, dict):
            raise ValueError("it holds no settings")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} can't be read ({error}); mend it or choose another --workdir.") from error
    return stored


def check_settings(workdir: str, config: Any, defaults: Mapping[str, Any] | None = None) -> None:
    """Checks that the run in `workdir` was started with these settings; settings newer than the run had their defaults.

    Raises:
        UserError: there is no run, or it has other settings (the message lists them).
    """
    if changed := differences(read_settings(workdir), to_dict(config), defaults):
        raise UserError(
            f"--workdir {workdir} belongs to a run with other settings ({'; '.join(changed)}); "
            "choose another --workdir or give the run's own settings."
        )


def differences(
    stored: dict[str, Any], current: dict[str, Any], defaults: Mapping[str, Any] | None = None
) -> list[str]:
    """Lists the settings that make `current` another run than `stored`, each as "config.key: stored -> current".

    Leaves out settings that may change on resuming. A setting newer than `stored` counts as its value in `defaults`.
    """
    old, new = dict(flatten(defaults or {})) | dict(flatten(stored)), dict(flatten(current))
    return [
        f"config.{key}: {old.get(key, '(absent)')!r} -> {new.get(key, '(absent)')!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not key.startswith(MAY_CHANGE_ON_RESUME)
    ]


def read_run_settings(workdir: str, overrides: Mapping[str, Any] = {}, defaults: Mapping[str, Any] = {}) -> Any:
    """Reads the settings of the run in `workdir`, checked and frozen.

    Args:
        overrides: new values by "section.key".
        defaults: nested values for settings that are newer than the run.

    Raises:
        UserError: there is no run, its settings can't be read, or a value is out of range.
    """
    try:
        settings = ml_collections.ConfigDict(dict(defaults) or recipes.defaults().to_dict())
        with settings.ignore_type():  # JSON has no tuples
            settings.update(read_settings(workdir))
            settings.update_from_flattened_dict(dict(overrides))
        return check_config(settings)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        path = os.path.join(workdir, "config.json")
        raise UserError(
            f"{path} does not hold the settings of a run ({first_line(error)}); fix or restore it."
        ) from error
