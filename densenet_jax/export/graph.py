"""Builds the function to export: the model with folded batch norms and optional preprocessing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from densenet_jax.augment.basic import normalize
from densenet_jax.data.class_names import format_labels
from densenet_jax.errors import UserError
from densenet_jax.kernels.cpu.primitive import plain_kernels
from densenet_jax.models.fold import fold_batch_norm
from densenet_jax.predict.model import Deployed
from densenet_jax.training.eval_step import make_predict_step, restrict
from densenet_jax.workdir import to_json


@dataclasses.dataclass(frozen=True)
class Graph:
    """The function to export."""

    # Maps images [b, h, w, c] of `input_dtype` to logits float32 [b, k]; holds the weights. Bytes may also be float32
    # in [0, 255].
    logits: Callable[[jax.Array], jax.Array]
    allowed_classes: tuple[int, ...] | None  # the only classes that get a probability; None allows all
    image_shape: tuple[int, int, int]  # (h, w, c)
    batch_size: int  # fixed batch size; 0 accepts any
    # Whether the input is normalized float32 (see `prepare`) and the output logits, instead of uint8 and probabilities.
    preprocessed: bool
    mean: tuple[float, ...]  # like `std`, a number a channel for images in [0, 1]
    std: tuple[float, ...]
    classes: int  # k, the width of the output
    info: dict[str, str]
    pixel_dtype: Any = np.uint8
    many_labels: bool = False  # each label has a probability of its own

    def function(self, images: jax.Array) -> jax.Array:
        """Maps images of `input_dtype` [b, h, w, c] to the output named `output_name`, float32 [b, k]."""
        logits = self.logits(images)
        if self.preprocessed:
            return logits
        logits = logits if self.allowed_classes is None else restrict(logits, self.allowed_classes)
        return jax.nn.sigmoid(logits) if self.many_labels else jax.nn.softmax(logits)

    @property
    def input_dtype(self) -> Any:
        """Dtype of the input images."""
        return np.float32 if self.preprocessed else self.pixel_dtype

    @property
    def output_name(self) -> str:
        """Name of the output."""
        return "logits" if self.preprocessed else "probabilities"

    def prepare(self, images: np.ndarray) -> np.ndarray:
        """Converts images uint8 [n, h, w, c] to the input of the file."""
        return np.asarray(normalize(jnp.asarray(images), self.mean, self.std)) if self.preprocessed else images


def make_graph(model: Deployed, *, preprocess: bool = True, batch_size: int = 0) -> Graph:
    """Builds the graph of `model`, always in float32.

    Args:
        preprocess: whether to include normalization and the step from logits to probabilities.
        batch_size: fixed batch size; 0 accepts any.

    Raises:
        UserError: the model evaluates several crops of an image.
    """
    if len(model.transform.shape) != 3:
        raise UserError("config.eval.crops is 10, but an exported file takes a single crop; set it to 1.")
    module, variables = fold_batch_norm(to_float32(model.module), model.variables)
    white = np.iinfo(model.transform.dtype).max
    mean, std = (white * np.asarray(values, np.float32).reshape(1, 1, 1, -1) for values in (model.mean, model.std))

    def logits(images: jax.Array) -> jax.Array:
        if preprocess:
            images = (images.astype(jnp.float32) - mean) / std
        with plain_kernels():
            return module.apply(variables, images, train=False)  # type: ignore[return-value]

    height, width, channels = model.transform.shape
    return Graph(
        logits=logits,
        allowed_classes=model.allowed_classes,
        image_shape=(height, width, channels),
        batch_size=batch_size,
        preprocessed=not preprocess,
        mean=model.mean,
        std=model.std,
        classes=len(model.class_names),
        info={
            "model": model.name,
            "weights": model.source,
            "class_names": format_labels(model.class_names).rstrip("\n"),
            **({"labels": "multi"} if model.many_labels else {}),
            **_thresholds(model),
        },
        pixel_dtype=model.transform.dtype.type,
        many_labels=model.many_labels,
    )


def _thresholds(model: Deployed) -> dict[str, str]:
    """Returns the calibrated thresholds as a JSON list, null where a label has none."""
    if model.calibration is None or not model.calibration.thresholds:
        return {}
    return {"thresholds": to_json(model.calibration.thresholds)}


def to_float32(module: nn.Module) -> nn.Module:
    """Returns the module with float32 computation."""
    head = dataclasses.replace(module.head_options, dtype=jnp.float32)
    return module.clone(dtype=jnp.float32, head_options=head)


def reference_outputs(model: Deployed, graph: Graph, images: np.ndarray, batch_size: int = 32) -> np.ndarray:
    """Computes the original model's outputs, float32 [n, k], without folded batch norms, as the reference for a file.

    Args:
        graph: decides between probabilities and logits.
        images: uint8 [n, h, w, c].
    """
    module = to_float32(model.module)

    def answer(variables: dict[str, Any], batch: jax.Array) -> jax.Array:
        if graph.preprocessed:
            return module.apply(variables, batch, train=False)  # type: ignore[return-value]
        step = make_predict_step(
            module,
            lambda pixels: normalize(pixels, model.mean, model.std),
            classes=model.allowed_classes,
            many_labels=model.many_labels,
        )
        return step(variables, {"image": batch})["probability"]

    with jax.default_matmul_precision("highest"):
        compiled = jax.jit(answer)
        parts = []
        for start in range(0, len(images), batch_size):
            batch = graph.prepare(images[start : start + batch_size])
            missing = min(batch_size, len(images)) - len(batch)
            padded = np.concatenate([batch, np.zeros((missing, *batch.shape[1:]), batch.dtype)])
            parts.append(np.asarray(compiled(model.variables, padded))[: len(batch)])
    return np.concatenate(parts)
