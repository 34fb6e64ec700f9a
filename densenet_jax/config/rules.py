"""The rules of all settings, and their check."""

import contextlib
import json
import math
import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ml_collections

from densenet_jax.choices import DTYPES, KERNELS_WANTED, LOSSES, OPTIMIZERS, PROFILE, SCHEDULES, parse_weights
from densenet_jax.errors import UserError
from densenet_jax.training.best_metric import METRIC_WORDS

_Rule = tuple[str, Callable[[Any], object]]  # expectation, check; a check that raises met another type
_LARGEST = 3.4e38  # finite float32


def _one_of(*values: str | int) -> _Rule:
    *most, last = (str(value) or "empty" for value in values)
    return f"{', '.join(most)} or {last}", lambda value: value in values


def _number(expected: str, accepts: Callable[[float], bool]) -> _Rule:
    return expected, lambda value: not isinstance(value, bool | str) and accepts(value)


def _whole(low: int, high: int = 2**31 - 1) -> _Rule:
    return f"a whole number from {low} to {high}", lambda value: type(value) is int and low <= value <= high


def _each(expected: str, accepts: Callable[[float], bool], counts: tuple[int, ...] = ()) -> _Rule:
    """Makes the rule for a tuple of as many numbers as `counts` has; () is any number."""
    right = _number("", accepts)[1]
    return expected, lambda value: len(value) in (counts or (len(value),)) and all(map(right, value))


def _is_regular_expression(value: str) -> bool:
    with contextlib.suppress(re.error), warnings.catch_warnings(action="ignore"):
        return bool(re.compile(value))
    return False


def _is_pairs(value: Any) -> bool:
    return all(
        len(pair) == 2 and _is_regular_expression(pair[0]) and 0 <= pair[1] <= _LARGEST and not isinstance(pair, str)
        for pair in value
    )


def _is_names(value: Any) -> bool:
    return not isinstance(value, str) and all(isinstance(name, str) and name and "\0" not in name for name in value)


_TEXT: _Rule = ("text", lambda value: isinstance(value, str) and "\0" not in value)
_NAME: _Rule = ("a name", lambda value: bool(value) and _TEXT[1](value))
_SWITCH: _Rule = ("True or False", lambda value: isinstance(value, bool))
_POSITIVE = _number("more than 0", lambda value: value > 0)
_NOT_NEGATIVE = _number("0 or more", lambda value: value >= 0)
_SHARE = _number("a share in [0, 1]", lambda value: 0 <= value <= 1)
_BELOW_1 = _number("a share in [0, 1)", lambda value: 0 <= value < 1)
_EPOCHS = _number("0 or more, at most a million", lambda value: 0 <= value <= 1e6)
_COUNT = _whole(0)
_SIDE = 2**14  # pixels: more than any image of a data set, too few to overflow

# In the order of configs/default.py.
RULES: dict[str, _Rule] = {
    "profile": ("STEP:COUNT, both from 1 on, or empty", lambda value: value == "" or PROFILE.fullmatch(value)),
    "seed": _whole(0, 2**63 - 1),
    "model.name": _NAME,
    "model.pretrained": _TEXT,
    "model.pretrained_average": _one_of("auto", "raw", "average"),
    "model.growth_rate": _whole(0, 2**12),
    "model.block_sizes": ("whole numbers from 1 on, or ()", lambda value: all(map(_whole(1, 2**10)[1], value))),
    "model.num_classes": _whole(0, 2**20),
    "model.dtype": _one_of(*DTYPES),
    "model.classifier_dropout": _BELOW_1,
    "model.drop_path": _BELOW_1,
    "model.layer_dropout": _BELOW_1,
    "model.batch_norm_momentum": _BELOW_1,
    "model.batch_norm_epsilon": _NOT_NEGATIVE,
    "model.batch_norm_group_size": _COUNT,
    "model.unbiased_running_variance": _SWITCH,
    "model.remat": _SWITCH,
    "model.block_form": (
        "normalize_once, plain, or normalize_once_cpu, _tpu or _gpu",
        lambda value: re.fullmatch("plain|normalize_once(_cpu|_tpu|_gpu)?", value),
    ),
    "model.kernels": _one_of(*KERNELS_WANTED),
    "data.name": _NAME,
    "data.dir": _TEXT,
    "data.train_split": _NAME,
    "data.eval_split": _NAME,
    "data.holdout": _number(
        "a share below 1 or a number of images", lambda value: 0 <= value < 1 or value == int(value) > 0
    ),
    "data.labels": _one_of("single", "multi"),
    "data.uncertain": _one_of("ignore", "zero", "one"),
    "data.empty": _one_of("ignore", "zero"),
    "data.table": _TEXT,
    "data.image_column": _NAME,
    "data.label_columns": ('names of columns with brackets around them, such as ("cat",)', _is_names),
    "data.label_separator": _TEXT,
    "data.label_none": _TEXT,
    "data.split_column": _TEXT,
    "data.split_lists": (
        'pairs with brackets around each, such as (("train", "train.txt"), ("test", "test.txt"))',
        lambda value: all(len(pair) == 2 and _is_names(pair) for pair in value),
    ),
    "data.group_column": _TEXT,
    "data.sampler": _one_of("shuffled", "balanced"),
    "data.image_size_px": _whole(1, _SIDE),
    "data.channels": _whole(1, 64),
    "data.pixel_range": (
        "two different numbers, or ()",
        lambda value: not value or (len(value) == 2 and all(map(math.isfinite, value)) and value[0] != value[1]),
    ),
    "data.dicom_frame": _whole(0, 2**16),
    "data.exif_orientation": _SWITCH,
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
    "data.mean": _each("one number in [0, 1] a channel, or ()", lambda value: 0 <= value <= 1),
    "data.std": _each("one number above 0 a channel, or ()", lambda value: value > 0),
    "data.on_damaged": _one_of("error", "skip"),
    "data.allow_changed": _SWITCH,
    "data.antialias": _SWITCH,
    "data.reader_threads": _whole(0, 1024),
    "data.prefetch_batches": _whole(1, 2**16),
    "augment.flip": _SWITCH,
    "augment.pad_px": _whole(0, _SIDE),
    "augment.color_jitter": _each("three strengths from 0 on", lambda value: value >= 0, counts=(3,)),
    "augment.rand_layers": _whole(0, 64),
    "augment.rand_magnitude": _number("a strength from 0 to 10", lambda value: 0 <= value <= 10),
    "augment.erase_mode": _one_of("zero", "color", "pixel"),
    "augment.erase": _SHARE,
    "augment.repeats": _whole(1),
    "augment.mixup_alpha": _NOT_NEGATIVE,
    "augment.cutmix_alpha": _NOT_NEGATIVE,
    "augment.mix_probability": _SHARE,
    "augment.cutmix_share": _SHARE,
    "train.epochs": _number("more than 0, at most a million", lambda value: 0 < value <= 1e6),
    "train.patience_epochs": _EPOCHS,
    "train.global_batch_size": _whole(1),
    "train.microbatches": _whole(1),
    "train.sharding": _one_of("replicated", "fsdp"),
    "train.average_decay": _BELOW_1,
    "train.loss": _one_of(*LOSSES, ""),
    "train.loss_gammas": _each("two powers from 0 on, or ()", lambda value: value >= 0, counts=(0, 2)),
    "train.loss_margin": _BELOW_1,
    "train.class_weights": (
        "none, balanced or one number above 0 a class, such as (2.0, 1.0)",
        lambda value: value in ("none", "balanced") or all(0 < one <= _LARGEST for one in parse_weights(value)),
    ),
    "train.label_smoothing": _BELOW_1,
    "train.log_every_steps": _COUNT,
    "train.stall_secs": _number("a time from 0 on", lambda value: 0 <= value <= 1e9),
    "optim.name": _one_of(*OPTIMIZERS),
    "optim.learning_rate": _POSITIVE,
    "optim.base_batch_size": _COUNT,
    "optim.momentum": _BELOW_1,
    "optim.nesterov": _SWITCH,
    "optim.weight_decay": _NOT_NEGATIVE,
    "optim.decay_norm_and_bias": _SWITCH,
    "optim.clip_grad_norm": _NOT_NEGATIVE,
    "optim.betas": _each("two shares in [0, 1), such as (0.9, 0.999)", lambda value: 0 <= value < 1, counts=(2,)),
    "optim.rms_decay": _BELOW_1,
    "optim.epsilon": _NOT_NEGATIVE,
    "optim.freeze": ("a regular expression", _is_regular_expression),
    "optim.rate_multipliers": ('pairs with brackets around each, such as (("^params/classifier", 1.0),)', _is_pairs),
    "optim.layer_decay": _number("a factor in (0, 1]", lambda value: 0 < value <= 1),
    "optim.schedule": _one_of(*SCHEDULES),
    "optim.milestone_epochs": _each("epochs above 0, at most a million", lambda value: 0 < value <= 1e6),
    "optim.milestone_steps": ("whole numbers from 1 on", lambda value: all(map(_whole(1)[1], value))),
    "optim.milestone_rates": _each("rates from 0 on", lambda value: value >= 0),
    "optim.decay_factor": _POSITIVE,
    "optim.decay_epochs": _EPOCHS,
    "optim.decay_steps": _COUNT,
    "optim.staircase": _SWITCH,
    "optim.end_learning_rate": _NOT_NEGATIVE,
    "optim.cycle_epochs": _EPOCHS,
    "optim.cycle_steps": _COUNT,
    "optim.cycle_multiplier": _number("1 to 1000", lambda value: 1 <= value <= 1000),
    "optim.cycle_decay": _number("a factor in (0, 1]", lambda value: 0 < value <= 1),
    "optim.rise_fraction": _number("a share in (0, 1)", lambda value: 0 < value < 1),
    "optim.start_divisor": _number("1 or more", lambda value: value >= 1),
    "optim.end_divisor": _number("1 or more", lambda value: value >= 1),
    "optim.warmup_epochs": _EPOCHS,
    "optim.warmup_steps": _COUNT,
    "optim.warmup_learning_rate": _NOT_NEGATIVE,
    "eval.every_epochs": _POSITIVE,
    "eval.batch_size": _COUNT,
    "eval.image_size_px": _whole(0, _SIDE),
    "eval.crop_fraction": _SHARE,
    "eval.interpolation": _one_of("bilinear", "bicubic", ""),
    "eval.crops": _one_of(1, 10),
    "eval.class_map": _one_of("present", ""),
    "eval.per_class_output": _TEXT,
    "eval.confusion_output": _TEXT,
    "eval.checkpoint": (
        "latest, best or a step",
        lambda value: value in ("latest", "best") or (str(value).isdecimal() and str(value).isascii()),
    ),
    "checkpoint.best_metric": _one_of(*METRIC_WORDS, ""),
    "checkpoint.every_steps": _whole(1),
    "checkpoint.max_to_keep": _whole(1),
    "serve.batch_sizes": ("sizes from 1 to 1024", lambda value: value and all(map(_whole(1, 1024)[1], value))),
    "serve.batch_wait_secs": _number("a time from 0 to 10", lambda value: 0 <= value <= 10),
    "serve.request_secs": _POSITIVE,
    "serve.stop_secs": _number("a time from 0 to 600", lambda value: 0 <= value <= 600),
    "serve.max_request_pixels": _whole(1, 10**12),
    "serve.hosts": ("host names", lambda value: all(isinstance(name, str) and name for name in value)),
    "serve.token_file": _TEXT,
    "serve.tls_certificate": _TEXT,
    "serve.tls_key": _TEXT,
}


def flatten(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields ("section.key", value) of every leaf, in the order of the file."""
    for key, value in config.items():
        if isinstance(value, ml_collections.ConfigDict | ml_collections.FrozenConfigDict | dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _fits_float32(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_fits_float32, value))
    return not isinstance(value, float) or abs(value) <= _LARGEST


def check_config(config: ml_collections.ConfigDict) -> ml_collections.FrozenConfigDict:
    """Checks every value on its own and freezes the settings.

    Raises:
        UserError: a value is out of its range; the message names the key, the value and what is expected.
    """
    for key, value in flatten(config):
        expected, accepts = RULES.get(key, ("", lambda _: True))
        try:
            right = accepts(value)
        except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError):
            right = False
        if not right:
            raise UserError(f"config.{key} is {value!r}; expected {expected}.")
        if not _fits_float32(value):
            raise UserError(f"config.{key} is {value!r}; expected numbers that float32 can hold.")
    _check_labels(config)
    check_mean_std(config.data.mean, config.data.std, config.data.channels)
    batch = config.train.global_batch_size
    for key, parts in (("train.microbatches", config.train.microbatches), ("augment.repeats", config.augment.repeats)):
        if batch % parts:
            raise UserError(
                f"config.{key} is {parts}, which does not divide config.train.global_batch_size {batch}; choose a "
                "divisor."
            )
    return ml_collections.FrozenConfigDict(config)


def check_mean_std(mean: Sequence[float], std: Sequence[float], channels: int) -> None:
    """Checks that there is one number a channel, or none.

    Raises:
        UserError: there are more or fewer.
    """
    for key, values in (("config.data.mean", mean), ("config.data.std", std)):
        if len(values) not in (0, channels):
            raise UserError(
                f"{key} has {len(values)} numbers {tuple(values)}, but config.data.channels is {channels}; give one "
                "number a channel."
            )


def _check_labels(config: ml_collections.ConfigDict) -> None:
    """Checks that the loss and the evaluation are for the number of labels an image has."""
    labels, loss = config.data.labels, config.train.loss
    if loss and LOSSES[loss].labels != labels:
        fitting = " or ".join(name for name, kind in LOSSES.items() if kind.labels == labels)
        raise UserError(
            f"config.train.loss is {loss!r}, which is for config.data.labels={LOSSES[loss].labels}, but that is "
            f"{labels!r}; expected {fitting}, or empty for the usual one."
        )
    for key in ("class_map", "per_class_output", "confusion_output"):
        if labels == "multi" and config.eval[key]:
            raise UserError(
                f"config.eval.{key} is {config.eval[key]!r}, which expects one class an image, but config.data.labels "
                "is 'multi'; leave it empty."
            )


def to_dict(config: Any) -> dict[str, Any]:
    """Converts the settings to plain, JSON-ready nested dictionaries; tuples become lists."""
    return json.loads(json.dumps(config.to_dict()))
