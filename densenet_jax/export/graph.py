"""The function that a file holds: a model with folded batch norms and, where wanted, its preprocessing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from densenet_jax.augment.basic import normalize
from densenet_jax.errors import UserError
from densenet_jax.kernels.cpu.primitive import plain_kernels
from densenet_jax.models.fold import fold_batch_norm
from densenet_jax.predict.model import Deployed
from densenet_jax.training.eval_step import restrict
from densenet_jax.training.predict_step import make_predict_step


@dataclasses.dataclass(frozen=True)
class Graph:
    """What is exported.

    Attributes:
        logits: images [b, h, w, c] of `input_dtype` to logits float32 [b, k]; the weights are in it. Bytes may
            also come as float32 in [0, 255].
        allowed_classes: the only ones that have a probability; None: all.
        image_shape: (h, w, c).
        batch_size: b; 0 leaves it open.
        preprocessed: False: the input is uint8 and the output probabilities; True: the input is normalised float32
            (see `prepared`) and the output logits.
        mean: of each channel, of images in [0, 1].
        std: likewise.
        classes: width of the output.
        info: facts for whoever finds the file: strings by name.
    """

    logits: Callable[[jax.Array], jax.Array]
    allowed_classes: tuple[int, ...] | None
    image_shape: tuple[int, int, int]
    batch_size: int
    preprocessed: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: int
    info: dict[str, str]

    def function(self, images: jax.Array) -> jax.Array:
        """All of the graph: images of `input_dtype` to what `output_name` says, float32 [b, k]."""
        logits = self.logits(images)
        if self.preprocessed:
            return logits
        return jax.nn.softmax(logits if self.allowed_classes is None else restrict(logits, self.allowed_classes))

    @property
    def input_dtype(self) -> Any:
        """Of the images that the file takes."""
        return np.float32 if self.preprocessed else np.uint8

    @property
    def output_name(self) -> str:
        """What comes out."""
        return "logits" if self.preprocessed else "probabilities"

    def prepared(self, images: np.ndarray) -> np.ndarray:
        """Images uint8 [n, h, w, c] as the file takes them."""
        return np.asarray(normalize(jnp.asarray(images), self.mean, self.std)) if self.preprocessed else images


def make_graph(model: Deployed, *, preprocess: bool = True, batch_size: int = 0) -> Graph:
    """The graph of `model` in float32, whatever it was trained in.

    Args:
        model: what is exported.
        preprocess: whether the normalisation and the softmax are part of the graph.
        batch_size: 0 leaves it open.

    Raises:
        UserError: the model looks at several crops of an image.
    """
    if len(model.transform.shape) != 3:
        raise UserError("config.eval.crops is 10, but an exported file looks at one crop; set it to 1.")
    module, variables = fold_batch_norm(in_float32(model.module), model.variables)
    mean, std = (255 * np.asarray(values, np.float32).reshape(1, 1, 1, -1) for values in (model.mean, model.std))

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
        info={"model": model.name, "weights": model.source, "class_names": "\n".join(model.class_names)},
    )


def in_float32(module: nn.Module) -> nn.Module:
    """The same network computing in float32."""
    head = dataclasses.replace(module.head_options, dtype=jnp.float32)
    return module.clone(dtype=jnp.float32, head_options=head)


def reference_outputs(model: Deployed, graph: Graph, images: np.ndarray, batch_size: int = 32) -> np.ndarray:
    """What the model itself, its batch norms not folded, answers in float32: what a file is judged by.

    Args:
        model: what `graph` was made of.
        graph: decides between probabilities and logits.
        images: uint8 [n, h, w, c].
        batch_size: of the computation.

    Returns:
        float32 [n, k].
    """
    module = in_float32(model.module)

    def answer(variables: dict[str, Any], batch: jax.Array) -> jax.Array:
        if graph.preprocessed:
            return module.apply(variables, batch, train=False)  # type: ignore[return-value]
        step = make_predict_step(
            module, lambda pixels: normalize(pixels, model.mean, model.std), classes=model.allowed_classes
        )
        return step(variables, {"image": batch})["probability"]

    with jax.default_matmul_precision("highest"):
        compiled = jax.jit(answer)
        parts = []
        for start in range(0, len(images), batch_size):
            batch = graph.prepared(images[start : start + batch_size])
            missing = min(batch_size, len(images)) - len(batch)
            padded = np.concatenate([batch, np.zeros((missing, *batch.shape[1:]), batch.dtype)])
            parts.append(np.asarray(compiled(model.variables, padded))[: len(batch)])
    return np.concatenate(parts)
