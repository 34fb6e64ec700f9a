"""Builds the function to export: the model with folded batch norms and optional preprocessing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from densenet_jax.augment.basic import normalize
from densenet_jax.errors import UserError
from densenet_jax.kernels.cpu.primitive import plain_kernels
from densenet_jax.models.fold import fold_batch_norm
from densenet_jax.predict.explain import logits_and_maps
from densenet_jax.predict.model import Deployed
from densenet_jax.training.eval_step import make_predict_step, restrict
from densenet_jax.workdir import to_json


@dataclasses.dataclass(frozen=True)
class Graph:
    """The function to export."""

    # Computes the logits float32 [b, k] of images [b, h, w, c] of `input_dtype`, with `has_maps` also the maps; holds
    # the weights. Bytes may also be float32 in [0, 255].
    logits: Callable[[jax.Array], Any]
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
    has_maps: bool = False  # whether a second output has the class activation maps, float32 [b, h2, w2, k]

    def function(self, images: jax.Array) -> Any:
        """Computes the outputs named `output_names` of images of `input_dtype` [b, h, w, c]: an array, or two."""
        logits, *maps = self.logits(images) if self.has_maps else (self.logits(images),)
        if not self.preprocessed:
            logits = logits if self.allowed_classes is None else restrict(logits, self.allowed_classes)
            logits = jax.nn.sigmoid(logits) if self.many_labels else jax.nn.softmax(logits)
        return (logits, *maps) if maps else logits

    @property
    def input_dtype(self) -> Any:
        """Dtype of the input images."""
        return np.float32 if self.preprocessed else self.pixel_dtype

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of the outputs, in order."""
        name = "logits" if self.preprocessed else "probabilities"
        return (name, "maps") if self.has_maps else (name,)

    def prepare(self, images: np.ndarray) -> np.ndarray:
        """Converts images uint8 [n, h, w, c] to the input of the file."""
        return np.asarray(normalize(jnp.asarray(images), self.mean, self.std)) if self.preprocessed else images


def make_graph(model: Deployed, *, preprocess: bool = True, batch_size: int = 0, maps: bool = False) -> Graph:
    """Builds the graph of `model`, always in float32.

    Args:
        preprocess: whether to include normalization and the step from logits to probabilities.
        batch_size: fixed batch size; 0 accepts any.
        maps: whether to give the class activation maps of all classes as well.

    Raises:
        UserError: the model evaluates several crops of an image.
    """
    if len(model.transform.shape) != 3:
        raise UserError("config.eval.crops is 10, but an exported file takes a single crop; set it to 1.")
    module, variables = fold_batch_norm(to_float32(model.module), model.variables)
    white = np.iinfo(model.transform.dtype).max
    mean, std = (white * np.asarray(values, np.float32).reshape(1, 1, 1, -1) for values in (model.mean, model.std))

    def logits(images: jax.Array) -> Any:
        if preprocess:
            images = (images.astype(jnp.float32) - mean) / std
        with plain_kernels():
            return (logits_and_maps if maps else apply_module)(module, variables, images)

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
            **_class_names(model.class_names),
            **({"labels": "multi"} if model.many_labels else {}),
            **_thresholds(model),
        },
        pixel_dtype=model.transform.dtype.type,
        many_labels=model.many_labels,
        has_maps=maps,
    )


def apply_module(module: nn.Module, variables: dict[str, Any], images: jax.Array) -> Any:
    """Returns the logits of normalized images."""
    return module.apply(variables, images, train=False)


def _class_names(names: Sequence[str]) -> dict[str, str]:
    """Returns the names as a JSON list, and one a line unless a name has a line break."""
    lines = "\n".join(names)
    plain = {"class_names": lines} if lines.splitlines() == list(names) else {}
    return plain | {"class_names_json": to_json(list(names))}


def _thresholds(model: Deployed) -> dict[str, str]:
    """Returns the calibrated thresholds as a JSON list, null where a label has none."""
    return {} if model.thresholds is None else {"thresholds": to_json(model.thresholds)}


def to_float32(module: nn.Module) -> nn.Module:
    """Returns the module with float32 computation."""
    head = dataclasses.replace(module.head_options, dtype=jnp.float32)
    return module.clone(dtype=jnp.float32, head_options=head)


def reference_outputs(model: Deployed, graph: Graph, images: np.ndarray, batch_size: int = 32) -> Any:
    """Computes the original model's outputs, without folded batch norms, as the reference for a file.

    They are float32 [n, k], and with maps a pair of that and float32 [n, h, w, k].

    Args:
        graph: decides between probabilities and logits.
        images: uint8 [n, h, w, c].
    """
    module = to_float32(model.module)

    def seen(pixels: jax.Array) -> jax.Array:
        return pixels if graph.preprocessed else normalize(pixels, model.mean, model.std)

    def answer(variables: dict[str, Any], batch: jax.Array) -> Any:
        if graph.preprocessed:
            outputs = apply_module(module, variables, batch)
        else:
            step = make_predict_step(module, seen, classes=model.allowed_classes, many_labels=model.many_labels)
            outputs = step(variables, {"image": batch})["probability"]
        if not graph.has_maps:
            return outputs
        return outputs, logits_and_maps(module, variables, seen(batch))[1]

    with jax.default_matmul_precision("highest"):
        compiled = jax.jit(answer)
        parts = []
        for start in range(0, len(images), batch_size):
            batch = graph.prepare(images[start : start + batch_size])
            missing = min(batch_size, len(images)) - len(batch)
            padded = np.concatenate([batch, np.zeros((missing, *batch.shape[1:]), batch.dtype)])
            parts.append(jax.device_get(compiled(model.variables, padded)))
    return jax.tree.map(lambda *arrays: np.concatenate(arrays)[: len(images)], *parts)
