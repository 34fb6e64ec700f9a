"""The model compiled for a few batch sizes: takes preprocessed images of any number."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from densenet_jax.augment.basic import normalize
from densenet_jax.errors import UserError
from densenet_jax.models.fused.inference import prepare_inference
from densenet_jax.predict.explain import activation_maps, layer_names, weigh_by_gradients
from densenet_jax.predict.model import Deployed
from densenet_jax.training import sharding
from densenet_jax.training.eval_step import make_predict_step

BATCH_SIZES = (1, 4, 16, 64)
FEATURES = ("pooled", "pyramid")
BEST_CLASS = -1  # stands for the most probable class of an image


class CompiledModel:
    """Computes probabilities, features and class activation maps of batches on all devices of this process.

    Attributes:
        batch_sizes: compiled batch sizes, smallest first; other batches are padded to the next one.
        class_names: of each class.
        image_shape: of a preprocessed image: (h, w, c), or (5, h, w, c) with `config.eval.crops=10`.
        thresholds: probability of each label from which on it is predicted; None without a calibration of many labels.
    """

    def __init__(self, model: Deployed, batch_sizes: Sequence[int]) -> None:
        """Puts the weights on the devices; compiles nothing yet (see `compile`).

        `batch_sizes` are rounded up to multiples of the number of devices.

        Raises:
            UserError: a batch size is below 1.
        """
        if not batch_sizes or min(batch_sizes) < 1:
            raise UserError(f"batch_sizes is {tuple(batch_sizes)}; expected at least one size, each of at least 1.")
        self.model, self.class_names, self.thresholds = model, model.class_names, model.thresholds
        self.image_shape, self._dtype = model.transform.shape, model.transform.dtype
        mesh = sharding.make_mesh(jax.local_devices())
        self.batch_sizes = tuple(sorted({-(-size // mesh.size) * mesh.size for size in batch_sizes}))
        self._over_data = sharding.over_data(mesh)
        module: Any
        module, variables = prepare_inference(model.module, model.variables, mesh.size)
        self._module = module
        self._variables = jax.device_put(variables, sharding.replicated(mesh))
        self._layers: set[str] = set()  # known to exist
        self._step = jax.jit(
            self._answer, static_argnames=("features", "layer"), out_shardings=sharding.replicated(mesh)
        )

    def compile(self, features: str = "", *, explain: bool = False, layer: str = "") -> None:
        """Compiles every batch size, so that later calls don't wait for it."""
        for size in self.batch_sizes:
            classes = np.full(size, BEST_CLASS, np.int32) if explain else None
            images = np.zeros((size, *self.image_shape), self._dtype)
            jax.block_until_ready(self.dispatch(images, features, classes, layer))

    def dispatch(
        self, images: np.ndarray, features: str = "", classes: np.ndarray | None = None, layer: str = ""
    ) -> dict[str, jax.Array]:
        """Starts computing one batch and returns without waiting, so that the caller can read the next one.

        Args:
            images: uint8 or uint16 [b, *image_shape], where b is at most the largest of `batch_sizes`.
            features: also computes these, see `parse_features`; "" computes probabilities only.
            classes: int32 [b]; also computes the class activation maps of these classes, or of the most probable one
                for `BEST_CLASS`.
            layer: with classes, computes Grad-CAM at this inner layer instead; see `check_layer`.

        Returns:
            "probability" float32 [p, classes], and "pooled" float32 [p, c] or "stride_4", ... float32 [p, h, w, c],
            "map" float32 [p, h, w] and "class_id" float32 [p]. p is the padded size; only the first b rows are valid.

        Raises:
            UserError: the array has another shape or dtype, or there are no such features.
        """
        self._check_batch(images, features, classes, layer)
        size = next((size for size in self.batch_sizes if size >= len(images)), None)
        if size is None or not len(images):
            raise UserError(f"a batch of {len(images)} images; expected 1 to {self.batch_sizes[-1]}.")
        if size > len(images):  # np.pad would copy a full batch
            images = np.pad(images, [(0, size - len(images)), *[(0, 0)] * len(self.image_shape)])
        if classes is not None:
            classes = jax.device_put(np.pad(classes, (0, size - len(classes))), self._over_data)
        images = jax.device_put(images, self._over_data)
        return self._step(self._variables, images, classes, features=features, layer=layer)

    def output_shapes(
        self, features: str = "", *, explain: bool = False, layer: str = ""
    ) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of the outputs of `dispatch` without the batch dimension; compiles nothing."""
        images = jax.ShapeDtypeStruct((1, *self.image_shape), self._dtype)
        classes = jax.ShapeDtypeStruct((1,), jnp.int32) if explain else None
        answer = functools.partial(self._answer, features=features, layer=layer)
        shapes = jax.eval_shape(answer, self._variables, images, classes)
        return {name: leaf.shape[1:] for name, leaf in shapes.items()}

    def _in_chunks(
        self, images: np.ndarray, features: str = "", classes: np.ndarray | None = None, layer: str = ""
    ) -> dict[str, np.ndarray]:
        self._check_batch(images, features, classes, layer)
        parts, start = [], 0
        for size in cover(len(images), self.batch_sizes):
            chunk = images[start : start + size]
            of_chunk = None if classes is None else classes[start : start + size]
            outputs = jax.device_get(self.dispatch(chunk, features, of_chunk, layer))
            parts.append({name: array[: len(chunk)] for name, array in outputs.items()})
            start += size
        if not parts:
            shapes = self.output_shapes(features, explain=classes is not None, layer=layer)
            return {name: np.zeros((0, *shape), np.float32) for name, shape in shapes.items()}
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _check_batch(self, images: np.ndarray, features: str, classes: np.ndarray | None, layer: str) -> None:
        if images.dtype not in (np.uint8, np.uint16) or images.shape[1:] != self.image_shape:
            raise UserError(
                f"images are {images.dtype}{list(images.shape)}; expected uint8 or uint16 {['b', *self.image_shape]}, "
                "as preprocess gives them."
            )
        if features:
            parse_features(features, self.model)
        if (features or classes is not None) and len(self.image_shape) != 3:
            what = "features need" if features else "an explanation needs"
            raise UserError(f"{what} a single crop, but config.eval.crops is 10; set it to 1.")
        if classes is not None and classes.shape != (len(images),):
            raise UserError(f"classes has shape {classes.shape}; expected one class for each of {len(images)} images.")
        if classes is not None and not np.all((classes >= BEST_CLASS) & (classes < len(self.class_names))):
            raise UserError(f"classes is {classes.tolist()}; expected numbers from 0 to {len(self.class_names) - 1}.")
        if layer and layer not in self._layers:
            check_layer(self.model, layer)
            self._layers.add(layer)

    def _answer(
        self,
        variables: dict[str, Any],
        images: jax.Array,
        classes: jax.Array | None = None,
        features: str = "",
        layer: str = "",
    ) -> dict[str, jax.Array]:
        model, module = self.model, self._module
        seen = functools.partial(normalize, mean=model.mean, std=model.std, dtype=module.dtype)
        step = make_predict_step(module, seen, classes=model.allowed_classes, many_labels=model.many_labels)
        outputs = step(variables, {"image": images})
        if features:
            # The compiler merges this with the classification above, so the network runs once.
            body = module.clone(output=parse_features(features, model))
            activations: Any = body.apply(variables, seen(images), train=False)
            if features == "pooled":
                outputs["pooled"] = activations
            else:
                outputs |= {f"stride_{stride}": part for stride, part in activations.items()}
        if classes is not None:
            classes = jnp.where(classes == BEST_CLASS, jnp.argmax(outputs["probability"], axis=-1), classes)
            outputs["class_id"] = classes
            arguments = (module, variables, seen(images), classes)
            outputs["map"] = (
                jax.nn.relu(weigh_by_gradients(*arguments, layer)) if layer else activation_maps(*arguments)
            )
        return {name: array.astype(jnp.float32) for name, array in outputs.items()}


def cover(count: int, sizes: Sequence[int]) -> list[int]:
    """Chooses compiled sizes (in rising order) that together take `count` images, at most half of each one padding.

    Sizes (1, 4, 16, 64) give: 3 -> [4], 6 -> [4, 4], 9 -> [16], 18 -> [16, 4], 100 -> [64, 64].
    """
    batches: list[int] = []
    while count > 0:
        enough = next((size for size in sizes if size >= count), sizes[-1])
        fits = [size for size in sizes if size <= count]
        batches.append(enough if count >= enough / 2 or not fits else fits[-1])
        count -= batches[-1]
    return batches


def parse_features(features: str, model: Deployed) -> str | tuple[int, ...]:
    """Parses "pooled", "pyramid" or strides such as "stride_2,stride_8" to an output of the model's module.

    Raises:
        UserError: there are no such features.
    """
    if features in FEATURES:
        return features
    module: Any = model.module
    strides, names = {f"stride_{stride}": stride for stride in module.strides}, features.split(",")
    if not strides.keys() >= set(names):
        known = ", ".join(strides)
        raise UserError(f"features is {features!r}; expected pooled, pyramid or some of {model.name}'s {known}.")
    return tuple(strides[name] for name in names)


def check_layer(model: Deployed, layer: str) -> None:
    """Checks that Grad-CAM can look at a layer of the model.

    Raises:
        UserError: there is no such layer, or the model evaluates ten crops.
    """
    if len(model.transform.shape) != 3:
        raise UserError("an explanation needs a single crop, but config.eval.crops is 10; set it to 1.")
    names = layer_names(model.module, model.variables, model.transform.shape)
    if layer not in names:
        raise UserError(f"layer is {layer!r}; expected one of {model.name}'s {', '.join(names)}.")
