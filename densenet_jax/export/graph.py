"""Builds the function to export: the model with folded batch norms and optional preprocessing."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from densenet_jax.augment.basic import normalize
from densenet_jax.errors import UserError
from densenet_jax.export.verify import Outputs, run_in_chunks
from densenet_jax.kernels.cpu.primitive import plain_kernels
from densenet_jax.models.fold import fold_batch_norm
from densenet_jax.predict.explain import logits_and_maps
from densenet_jax.predict.model import Deployed
from densenet_jax.training.eval_step import make_predict_step, restrict
from densenet_jax.workdir import to_json

_REFERENCE_BATCH = 32


@dataclasses.dataclass(frozen=True)
class Graph:
    """The function to export, of a model in float32.

    Attributes:
        logits: computes the logits float32 [b, k] of images [b, h, w, c] of `input_dtype`, with `has_maps` also the
            maps; holds the weights. Bytes may also be float32 in [0, 255].
        batch_size: fixed batch size; 0 accepts any.
        preprocessed: whether the input is normalized float32 (see `prepare`) and the output logits, instead of pixels
            and probabilities.
        has_maps: whether a second output has the class activation maps, float32 [b, h2, w2, k].
    """

    model: Deployed
    logits: Callable[[jax.Array], Any]
    batch_size: int
    preprocessed: bool
    has_maps: bool

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Height, width and channels."""
        return self.model.transform.shape

    @property
    def info(self) -> dict[str, str]:
        """Metadata of the exported file: class names as a JSON list, and one a line unless one has a line break."""
        model = self.model
        info = {"model": model.name, "weights": model.source}
        if (lines := "\n".join(model.class_names)).splitlines() == list(model.class_names):
            info["class_names"] = lines
        info["class_names_json"] = to_json(list(model.class_names))
        if model.many_labels:
            info["labels"] = "multi"
        if model.thresholds is not None:
            info["thresholds"] = to_json(model.thresholds)  # null where a label has none
        return info

    def function(self, images: jax.Array) -> Any:
        """Computes the outputs named `output_names` of images of `input_dtype` [b, h, w, c]: an array, or two."""
        logits, *maps = self.logits(images) if self.has_maps else (self.logits(images),)
        if not self.preprocessed:
            classes = self.model.allowed_classes
            logits = logits if classes is None else restrict(logits, classes)
            logits = jax.nn.sigmoid(logits) if self.model.many_labels else jax.nn.softmax(logits)
        return (logits, *maps) if maps else logits

    @property
    def input_dtype(self) -> Any:
        """Dtype of the input images."""
        return np.float32 if self.preprocessed else self.model.transform.dtype.type

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of the outputs, in order."""
        name = "logits" if self.preprocessed else "probabilities"
        return (name, "maps") if self.has_maps else (name,)

    def prepare(self, images: np.ndarray) -> np.ndarray:
        """Converts images uint8 [n, h, w, c] to the input of the file."""
        mean, std = self.model.mean, self.model.std
        return np.asarray(normalize(jnp.asarray(images), mean, std)) if self.preprocessed else images


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

    return Graph(model, logits, batch_size, not preprocess, maps)


def apply_module(module: nn.Module, variables: dict[str, Any], images: jax.Array) -> Any:
    """Returns the logits of normalized images."""
    return module.apply(variables, images, train=False)


def to_float32(module: nn.Module) -> nn.Module:
    """Returns the module with float32 computation."""
    head = dataclasses.replace(module.head_options, dtype=jnp.float32)
    return module.clone(dtype=jnp.float32, head_options=head)


def reference_outputs(graph: Graph, images: np.ndarray) -> Outputs:
    """Computes the outputs of the model without folded batch norms for pixels [n, h, w, c], to compare a file with."""
    model, module = graph.model, to_float32(graph.model.module)

    def seen(pixels: jax.Array) -> jax.Array:
        return pixels if graph.preprocessed else normalize(pixels, model.mean, model.std)

    @jax.jit
    def answer(batch: jax.Array, variables: dict[str, Any]) -> tuple[jax.Array, ...]:
        if graph.preprocessed:
            outputs = apply_module(module, variables, batch)
        else:
            step = make_predict_step(module, seen, classes=model.allowed_classes, many_labels=model.many_labels)
            outputs = step(variables, {"image": batch})["probability"]
        return (outputs, logits_and_maps(module, variables, seen(batch))[1]) if graph.has_maps else (outputs,)

    def call(batch: np.ndarray) -> Outputs:
        return jax.device_get(answer(batch, model.variables))

    with jax.default_matmul_precision("highest"):
        return run_in_chunks(call, graph.prepare(images), min(_REFERENCE_BATCH, len(images)))
