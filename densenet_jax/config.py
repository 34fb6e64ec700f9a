"""Settings: read from a recipe and the command line, checked, compared and written down."""

import difflib
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ml_collections

from densenet_jax.errors import UserError
from densenet_jax.kernels.select import KERNELS_WANTED
from densenet_jax.system.profiler import is_profile
from densenet_jax.training.precision import POLICIES

# A run may be continued with other values of these: they change where or how fast it computes, not what.
MAY_CHANGE_ON_RESUME = (
    "model.dtype",
    "model.remat",
    "model.block_form",
    "model.kernels",
    "data.dir",
    "data.allow_changed",
    "data.class_order",  # class names are compared with the checkpoint's
    "data.reader_threads",
    "data.prefetch_batches",
    "train.log_every_steps",
    "train.stall_secs",
    "profile",
    "train.sharding",
    "eval.",
    "checkpoint.",
    "serve.",
)

# Settings that older runs don't have, with the values that they were made with.
ADDED_LATER: dict[str, Any] = {
    "data": {"class_order": "text", "allow_changed": False, "pixel_range": [], "exif_orientation": False}
}

_POSITIVE: Callable[[Any], bool] = lambda value: value > 0  # noqa: E731
_NOT_NEGATIVE: Callable[[Any], bool] = lambda value: value >= 0  # noqa: E731
_SHARE: Callable[[Any], bool] = lambda value: 0 <= value <= 1  # noqa: E731
_RATE: Callable[[Any], bool] = lambda value: 0 <= value < 1  # noqa: E731


def _is_regular_expression(value: str) -> bool:
    try:
        re.compile(value)
    except re.error:
        return False
    return True


_Rule = tuple[str, Callable[[Any], bool]]  # what is expected, check


def _one_of(*values: str | int) -> _Rule:
    *most, last = map(str, values)
    return f"{', '.join(most)} or {last}", lambda value: value in values


_RULES: dict[str, _Rule] = {
    "profile": ("STEP:COUNT, both from 1 on, or empty", is_profile),
    "seed": ("a whole number from 0 on", _NOT_NEGATIVE),
    "model.pretrained_average": _one_of("auto", "raw", "average"),
    "model.num_classes": ("0 or more", _NOT_NEGATIVE),
    "model.dtype": _one_of(*POLICIES),
    "model.classifier_dropout": ("a rate in [0, 1)", _RATE),
    "model.layer_dropout": ("a rate in [0, 1)", _RATE),
    "model.batch_norm_momentum": ("a share in [0, 1)", _RATE),
    "model.batch_norm_group_size": ("0 or more", _NOT_NEGATIVE),
    "model.block_form": (
        "normalize_once, plain, or normalize_once_cpu, _tpu or _gpu",
        lambda value: value == "plain" or re.fullmatch("normalize_once(_cpu|_tpu|_gpu)?", value) is not None,
    ),
    "model.kernels": _one_of(*KERNELS_WANTED),
    "data.image_size_px": ("more than 0", _POSITIVE),
    "data.channels": ("a number from 1 to 64", lambda value: 1 <= value <= 64),
    "data.pixel_range": (
        "two different numbers, or ()",
        lambda value: not value or (len(value) == 2 and all(map(math.isfinite, value)) and value[0] != value[1]),
    ),
    "data.class_order": (
        "text, natural or a file with a class name a line",
        lambda value: value in ("text", "natural") or os.path.isfile(value),
    ),
    "data.crop": _one_of("random_resized_crop", "none"),
    "data.crop_area": (
        "two shares 0 < low <= high <= 1",
        lambda value: len(value) == 2 and 0 < value[0] <= value[1] <= 1,
    ),
    "data.crop_aspect": ("two ratios 0 < low <= high", lambda value: len(value) == 2 and 0 < value[0] <= value[1]),
    "data.interpolation": _one_of("bilinear", "bicubic"),
    "augment.repeats": ("more than 0", _POSITIVE),
    "augment.pad_px": ("0 or more", _NOT_NEGATIVE),
    "augment.color_jitter": ("three strengths", lambda value: len(value) == 3 and min(value) >= 0),
    "augment.erase": ("a share in [0, 1]", _SHARE),
    "augment.erase_mode": _one_of("zero", "color", "pixel"),
    "augment.rand_layers": ("0 or more", _NOT_NEGATIVE),
    "augment.rand_magnitude": ("a strength from 0 to 10", lambda value: 0 <= value <= 10),
    "augment.mixup_alpha": ("0 or more", _NOT_NEGATIVE),
    "augment.cutmix_alpha": ("0 or more", _NOT_NEGATIVE),
    "augment.mix_probability": ("a share in [0, 1]", _SHARE),
    "augment.cutmix_share": ("a share in [0, 1]", _SHARE),
    "data.holdout": ("a share below 1 or a number of images", lambda value: 0 <= value < 1 or value == int(value)),
    "data.on_damaged": _one_of("error", "skip"),
    "model.batch_norm_epsilon": ("0 or more", _NOT_NEGATIVE),
    "train.sharding": _one_of("replicated", "fsdp"),
    "train.microbatches": ("more than 0", _POSITIVE),
    "train.average_decay": ("a share in [0, 1)", _RATE),
    "optim.base_batch_size": ("0 or more", _NOT_NEGATIVE),
    "optim.freeze": ("a regular expression", _is_regular_expression),
    "optim.clip_grad_norm": ("0 or more", _NOT_NEGATIVE),
    "data.mean": ("one number a channel, or ()", lambda value: all(0 <= entry <= 1 for entry in value)),
    "data.std": ("one number above 0 a channel, or ()", lambda value: all(entry > 0 for entry in value)),
    "data.reader_threads": ("0 or more", _NOT_NEGATIVE),
    "data.prefetch_batches": ("more than 0", _POSITIVE),
    "train.epochs": ("more than 0", _POSITIVE),
    "train.global_batch_size": ("more than 0", _POSITIVE),
    "train.label_smoothing": ("a share in [0, 1)", _RATE),
    "train.stall_secs": ("0 or more", _NOT_NEGATIVE),
    "train.log_every_steps": ("more than 0", _POSITIVE),
    "optim.learning_rate": ("more than 0", _POSITIVE),
    "optim.momentum": ("a share in [0, 1)", _RATE),
    "optim.weight_decay": ("0 or more", _NOT_NEGATIVE),
    "optim.warmup_epochs": ("0 or more", _NOT_NEGATIVE),
    "optim.warmup_steps": ("0 or more", _NOT_NEGATIVE),
    "eval.every_epochs": ("more than 0", _POSITIVE),
    "eval.batch_size": ("0 or more", _NOT_NEGATIVE),
    "eval.image_size_px": ("0 or more", _NOT_NEGATIVE),
    "eval.crop_fraction": ("a share in [0, 1]", _SHARE),
    "eval.interpolation": ("bilinear, bicubic or empty", lambda value: value in ("", "bilinear", "bicubic")),
    "eval.crops": _one_of(1, 10),
    "eval.class_map": ("present or empty", lambda value: value in ("", "present")),
    "eval.checkpoint": ("latest, best or a step", lambda value: value in ("latest", "best") or str(value).isdigit()),
    "checkpoint.every_steps": ("more than 0", _POSITIVE),
    "checkpoint.max_to_keep": ("more than 0", _POSITIVE),
    "serve.batch_sizes": ("sizes from 1 to 1024", lambda value: value and 1 <= min(value) <= max(value) <= 1024),
    "serve.batch_wait_secs": ("a time from 0 to 10", lambda value: 0 <= value <= 10),
}


def flatten(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields ("section.key", value) of every leaf, in the order of the file."""
    for key, value in config.items():
        if isinstance(value, ml_collections.ConfigDict | ml_collections.FrozenConfigDict | dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def nearest(name: str, known: list[str], prefix: str = "") -> str:
    """The known key that is written most like `name`, whole or by its last part, as the end of an error's sentence."""

    def likeness(key: str) -> float:
        own, last = name.split(".")[-1], key.split(".")[-1]
        if own == "".join(word[:1] for word in last.split("_")):
            return 1.0
        return max(difflib.SequenceMatcher(None, *pair).ratio() for pair in ((name, key), (own, last)))

    return f"; the nearest is {prefix}{max(known, key=likeness)}"


def explain_unknown_flag(name: str, flags: list[str], known: ml_collections.ConfigDict) -> str:
    """One sentence for a flag that does not exist, with the flag or setting that was probably meant.

    Args:
        name: the flag without its dashes.
        flags: the flags that exist.
        known: settings with every valid key.
    """
    keys = [key for key, _ in flatten(known)]
    if name.startswith("config."):
        return f"{name} is not a setting{nearest(name.removeprefix('config.'), keys, 'config.')}."
    plain = name.replace("-", "_")
    if (plain in flags or plain not in {key.split(".")[-1] for key in keys}) and (
        close := difflib.get_close_matches(plain, [*flags, "config"], n=1, cutoff=0.7)
    ):
        return f"--{name} is not a flag; the nearest is --{close[0]}."
    return f"--{name} is not a flag{nearest(plain, keys, '--config.')}=VALUE."


def explain_flag_error(error: Exception, arguments: list[str], known: ml_collections.ConfigDict) -> str:
    """One sentence for what absl, ml_collections or a recipe raised while the command line was read.

    Args:
        error: what was raised.
        arguments: the command line.
        known: settings with every valid key, to find the nearest one to a misspelt key.
    """
    if not isinstance(error, AttributeError | KeyError):
        return f"{error}".replace("flag --", "--")
    found = re.search(r"""['"]([\w.]+)\\?['"]""", str(error))
    name = found.group(1) if found else str(error)
    keys = [key for key, _ in flatten(known)]
    for argument in arguments:
        given = argument.lstrip("-").split("=")[0]
        if given.startswith("config.") and name in given.split("."):
            return f"{given} is not a setting{nearest(given.removeprefix('config.'), keys, 'config.')}."
    return f"the recipe sets or reads {name}, which is not a setting{nearest(name, keys, 'config.')}."


def check_config(config: ml_collections.ConfigDict) -> ml_collections.FrozenConfigDict:
    """Checks every value on its own and freezes the settings.

    Raises:
        UserError: a value is out of its range; the message names the key, the value and what is expected.
    """
    for key, value in flatten(config):
        expected, accepts = _RULES.get(key, ("", lambda _: True))
        if not accepts(value):
            raise UserError(f"config.{key} is {value!r}; expected {expected}.")
    return ml_collections.FrozenConfigDict(config)


def to_dict(config: Any) -> dict[str, Any]:
    """The settings as plain, JSON-ready nested dictionaries; tuples become lists."""
    return json.loads(json.dumps(config.to_dict()))


def differences(
    stored: dict[str, Any], current: dict[str, Any], defaults: Mapping[str, Any] | None = None
) -> list[str]:
    """Settings that make `current` another run than `stored`, each as "config.key: stored -> current".

    Settings that may change on resuming are left out. A setting that did not exist when `stored` was written counts
    as its default.

    Args:
        stored: settings of an earlier run, nested.
        current: those of this one.
        defaults: every setting with its default, nested.
    """
    old, new = dict(flatten(defaults or {})) | dict(flatten(stored)), dict(flatten(current))
    return [
        f"config.{key}: {old.get(key, '(absent)')!r} -> {new.get(key, '(absent)')!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not key.startswith(MAY_CHANGE_ON_RESUME)
    ]
