"""Names and forms that settings choose from. Loads no JAX: mistakes in the settings are reported without it."""

import re
from collections.abc import Sequence
from typing import NamedTuple

DTYPES = ("float32", "bfloat16", "int8", "float16", "float64")
KERNELS_WANTED = ("auto", "xla", "pallas")
OPTIMIZERS = ("sgd", "adamw", "lamb", "rmsprop")
SCHEDULES = ("constant", "multistep", "cosine", "exponential", "cosine_restarts", "one_cycle")
PROFILE = re.compile(r"([1-9]\d*):([1-9]\d*)")  # STEP:COUNT


class LossKind(NamedTuple):
    """A loss by name: the labels that it is for, its powers, and whether it has a margin."""

    labels: str
    gammas: tuple[float, float] = (0.0, 0.0)
    has_margin: bool = False


LOSSES = {
    "softmax": LossKind("single"),
    "binary": LossKind("single"),
    "sigmoid": LossKind("multi"),
    "focal": LossKind("multi", (2.0, 2.0)),
    "asymmetric": LossKind("multi", (0.0, 4.0), has_margin=True),
}


def parse_weights(weights: str | Sequence[float]) -> tuple[float, ...]:
    """Returns the numbers, which may be a text such as "2, 1, 0.5", with or without brackets.

    Raises:
        ValueError, TypeError: there are none, or something else.
    """
    if not weights:
        raise ValueError("no numbers")
    numbers = weights.strip("()[] ").removesuffix(",").split(",") if isinstance(weights, str) else weights
    return tuple(float(number) for number in numbers)
