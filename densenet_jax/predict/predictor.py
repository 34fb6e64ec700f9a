"""The model as a function of images, for use from Python.

predictor = densenet_jax.Predictor.from_workdir("runs/digits")
for answers in predictor(["three.png", "eight.png"]):
    print(answers[0].label, answers[0].probability)
"""

import dataclasses
import functools
import logging
import math
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from densenet_jax.augment.basic import normalize
from densenet_jax.data.batches import available_cores
from densenet_jax.data.decode import DamagedImage
from densenet_jax.data.pixels import join
from densenet_jax.errors import UserError
from densenet_jax.predict.explain import Explanation, activation_maps
from densenet_jax.predict.images import (
    DEFAULT_LIMITS,
    ImageError,
    ImageLimits,
    ImageSource,
    load_image,
    name_of,
    read_encoded,
)
from densenet_jax.predict.model import (
    Deployed,
    make_deployed,
    make_deployed_from_pretrained,
    read_run_settings,
)
from densenet_jax.training import sharding
from densenet_jax.training.eval_step import make_predict_step

logger = logging.getLogger(__name__)
BATCH_SIZES = (1, 4, 16, 64)
FEATURES = ("pooled", "pyramid")
BEST_CLASS = -1  # stands for the most probable class of an image


class ClassProbability(NamedTuple):
    """A class with its number, name and probability in [0, 1]."""

    class_id: int
    label: str
    probability: float


class Predictor:
    """Predicts images from files, bytes or arrays, preprocessed as in evaluation. Safe to call from many threads.

    Attributes:
        model: module, weights and preprocessing.
        limits: sizes above which an image is rejected.
        batch_sizes: compiled batch sizes, smallest first; other batches are padded to the next one.
    """

    def __init__(
        self, model: Deployed, *, batch_sizes: Sequence[int] = BATCH_SIZES, limits: ImageLimits = DEFAULT_LIMITS
    ) -> None:
        """Puts the weights on all devices of this process; compiles nothing yet (see `compile`).

        Args:
            batch_sizes: sizes to compile, rounded up to multiples of the number of devices.
            limits: sizes above which an image is rejected.

        Raises:
            UserError: a batch size is below 1.
        """
        if not batch_sizes or min(batch_sizes) < 1:
            raise UserError(f"batch_sizes is {tuple(batch_sizes)}; expected at least one size, each of at least 1.")
        self.model, self.limits = model, limits
        self._has_warned = False
        mesh = sharding.make_mesh(jax.local_devices())
        self.batch_sizes = tuple(sorted({-(-size // mesh.size) * mesh.size for size in batch_sizes}))
        self._over_data = sharding.over_data(mesh)
        self._variables = jax.device_put(model.variables, sharding.replicated(mesh))
        self._step = jax.jit(self._answer, static_argnames="features", out_shardings=sharding.replicated(mesh))

    @classmethod
    def from_workdir(
        cls, workdir: str | os.PathLike[str], checkpoint: str = "latest", labels: str = "", **options: Any
    ) -> "Predictor":
        """Loads the model of a run.

        Args:
            checkpoint: "latest", "best" or a step.
            labels: file with one class name a line; "" uses the run's own names.
            **options: passed to the constructor.

        Raises:
            UserError: there is no such checkpoint, or its settings can't be read.
        """
        path = os.fspath(workdir)
        config = read_run_settings(path, {"eval.checkpoint": str(checkpoint)})
        return cls(make_deployed(config, path, labels), **options)

    @classmethod
    def from_pretrained(
        cls, name: str, source: str, labels: str = "", *, many_labels: bool = False, **options: Any
    ) -> "Predictor":
        """Loads a published or local checkpoint with its own preprocessing.

        Args:
            name: variant, such as "densenet121".
            source: hub id or file, as in `densenet_jax.load_pretrained`.
            labels: file with one class name a line; "" uses ImageNet's names for 1,000 classes.
            many_labels: the outputs are labels, each with a probability of its own.
            **options: passed to the constructor.

        Raises:
            UserError: there is no such variant or checkpoint.
        """
        model = dataclasses.replace(make_deployed_from_pretrained(name, source, labels), many_labels=many_labels)
        return cls(model, **options)

    @property
    def _dtype(self) -> np.dtype:
        return self.model.transform.dtype

    @property
    def class_names(self) -> tuple[str, ...]:
        """Name of each class."""
        return self.model.class_names

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Shape of a preprocessed image: (h, w, c), or (5, h, w, c) with `config.eval.crops=10`."""
        return self.model.transform.shape

    def __call__(self, images: Iterable[ImageSource], topk: int = 5) -> list[list[ClassProbability]]:
        """Predicts the `topk` most probable classes of each image, best first; every label if it has many.

        Args:
            images: paths, encoded bytes, or arrays [h, w] or [h, w, c] of uint8, uint16 or floats in [0, 1].

        Raises:
            ImageError: an image is rejected; the message names it.
        """
        return [self.best(row, topk) for row in self.probabilities(self._preprocess_all(images))]

    def features(self, images: Iterable[ImageSource], kind: str = "pooled") -> np.ndarray | dict[int, np.ndarray]:
        """Extracts features, for retrieval for example.

        Args:
            kind: "pooled" for the classifier's input, "pyramid" for the last feature map of every stage.

        Returns:
            float32[n, c], or {stride: float32[n, h, w, c]}.

        Raises:
            ImageError: an image is rejected.
            UserError: there is no such kind, or the model evaluates ten crops.
        """
        outputs = self._in_chunks(self._preprocess_all(images), kind)
        if kind == "pooled":
            return outputs["pooled"]
        return {int(name.removeprefix("stride_")): maps for name, maps in outputs.items() if name != "probability"}

    def explain(self, images: Iterable[ImageSource], classes: Sequence[int] | None = None) -> list[Explanation]:
        """Computes a class activation map for each image: where in the image the evidence for a class is.

        Args:
            classes: class of each image; None takes the most probable ones.

        Raises:
            ImageError: an image is rejected.
            UserError: a class does not exist, or the model evaluates ten crops.
        """
        pixels = self._preprocess_all(images)
        chosen = np.full(len(pixels), BEST_CLASS, np.int32) if classes is None else np.asarray(classes, np.int32)
        outputs = self._in_chunks(pixels, classes=chosen)
        bias = np.asarray(self.model.variables["params"]["classifier"]["bias"], np.float32)
        rows = zip(outputs["class_id"].astype(int).tolist(), outputs["probability"], outputs["map"], strict=True)
        return [
            Explanation(
                number, self.class_names[number], float(probability[number]), activation_map, float(bias[number])
            )
            for number, probability, activation_map in rows
        ]

    def preprocess(self, image: ImageSource, name: str = "") -> np.ndarray:
        """Decodes, resizes and crops an image to uint8 or uint16 [image_shape]; the model normalizes it.

        Images of more than 8 bits, and all images for a model that was trained on such, give uint16.

        Args:
            image: a path, encoded bytes, or an array [h, w] or [h, w, c] of uint8, uint16 or floats in [0, 1].
            name: name of the image in messages; "" uses its path.

        Raises:
            ImageError: the image is rejected.
        """
        name, transform = name or name_of(image), self.model.transform
        try:
            if isinstance(image, np.ndarray):
                return transform.of_pixels(
                    load_image(
                        image,
                        transform.channels,
                        name=name,
                        limits=self.limits,
                        pixel_range=transform.pixel_range,
                        bits=transform.bits,
                    )
                )
            pixels = transform(read_encoded(image, name, self.limits), name=name)
            if pixels.dtype == np.uint16 and not transform.pixel_range and 0 < (highest := pixels.max()) < 65536 // 16:
                self._warn_of_dark(name, int(highest))
            return pixels
        except DamagedImage as error:
            raise ImageError(name, error.why) from error
        except MemoryError as error:
            raise ImageError(name, "there is not enough memory to decode it") from error

    def _warn_of_dark(self, name: str, highest: int) -> None:
        if not self._has_warned:
            logger.warning(
                "%s has 16 bits and no value above %d of 65535, so that it is almost black; "
                "config.data.pixel_range names the stored values that are black and white.",
                *(name, highest),
            )
        self._has_warned = True

    def probabilities(self, images: np.ndarray) -> np.ndarray:
        """Predicts preprocessed images [b, *image_shape] of any b: probabilities float32 [b, classes].

        Raises:
            UserError: the array has another shape or dtype.
        """
        return self._in_chunks(images)["probability"]

    def activation_maps(self, images: np.ndarray, classes: Sequence[int]) -> np.ndarray:
        """Computes the activation maps, float32 [b, h, w], of one class for each preprocessed image.

        Raises:
            UserError: a class does not exist, or the model evaluates ten crops.
        """
        return self._in_chunks(images, classes=np.asarray(classes, np.int32))["map"]

    def compile(self, features: str = "", *, explain: bool = False) -> None:
        """Compiles every batch size, so that later calls don't wait for it."""
        for size in self.batch_sizes:
            classes = np.full(size, BEST_CLASS, np.int32) if explain else None
            jax.block_until_ready(self.dispatch(np.zeros((size, *self.image_shape), self._dtype), features, classes))

    def dispatch(
        self, images: np.ndarray, features: str = "", classes: np.ndarray | None = None
    ) -> dict[str, jax.Array]:
        """Starts computing one batch and returns without waiting, so that the caller can read the next one.

        Args:
            images: uint8 or uint16 [b, *image_shape], where b is at most the largest of `batch_sizes`.
            features: also computes "pooled" or "pyramid"; "" computes probabilities only.
            classes: int32 [b]; also computes the class activation maps of these classes, or of the most probable one
                for `BEST_CLASS`.

        Returns:
            "probability" float32 [p, classes], and "pooled" float32 [p, c] or "stride_4", ... float32 [p, h, w, c],
            "map" float32 [p, h, w] and "class_id" float32 [p]. p is the padded size; only the first b rows are valid.

        Raises:
            UserError: the array has another shape or dtype, or there are no such features.
        """
        self._check_batch(images, features, classes)
        size = next((size for size in self.batch_sizes if size >= len(images)), None)
        if size is None or not len(images):
            raise UserError(f"a batch of {len(images)} images; expected 1 to {self.batch_sizes[-1]}.")
        if size > len(images):
            padding = np.zeros((size - len(images), *self.image_shape), images.dtype)
            images = np.concatenate([images, padding])
        if classes is not None:
            classes = jax.device_put(np.pad(classes, (0, size - len(classes))), self._over_data)
        return self._step(self._variables, jax.device_put(images, self._over_data), classes, features=features)

    def output_shapes(self, features: str = "", *, explain: bool = False) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of the outputs of `dispatch` without the batch dimension; compiles nothing."""
        images = jax.ShapeDtypeStruct((1, *self.image_shape), self._dtype)
        classes = jax.ShapeDtypeStruct((1,), jnp.int32) if explain else None
        answer = functools.partial(self._answer, features=features)
        shapes = jax.eval_shape(answer, self._variables, images, classes)
        return {name: leaf.shape[1:] for name, leaf in shapes.items()}

    def best(self, probabilities: np.ndarray, topk: int = 5) -> list[ClassProbability]:
        """Returns the `topk` highest of float32 [classes], best first; ties are in class order.

        If images have many labels, all are returned.
        """
        order = np.argsort(-probabilities, kind="stable")[: None if self.model.many_labels else topk]
        if self.model.allowed_classes is not None:
            order = order[: len(self.model.allowed_classes)]
        return [ClassProbability(int(i), self.class_names[i], float(probabilities[i])) for i in order]

    @property
    def thresholds(self) -> tuple[float, ...] | None:
        """Probability of each label from which on it is predicted; None without a calibration of many labels."""
        calibration = self.model.calibration
        return None if calibration is None or not calibration.thresholds else calibration.thresholds

    def is_predicted(self, answer: ClassProbability) -> bool:
        """Returns whether one of many labels is predicted: by its threshold, else if it is more likely than not."""
        threshold = self.thresholds[answer.class_id] if self.thresholds is not None else math.nan
        return answer.probability >= (0.5 if math.isnan(threshold) else threshold)

    def _preprocess_all(self, images: Iterable[ImageSource]) -> np.ndarray:
        with ThreadPoolExecutor(available_cores()) as pool:
            done = list(pool.map(self.preprocess, images))
        return join(done) if done else np.zeros((0, *self.image_shape), self._dtype)

    def _in_chunks(
        self, images: np.ndarray, features: str = "", classes: np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        self._check_batch(images, features, classes)
        most = self.batch_sizes[-1]
        parts = []
        for start in range(0, len(images), most):
            chunk = images[start : start + most]
            of_chunk = None if classes is None else classes[start : start + most]
            outputs = jax.device_get(self.dispatch(chunk, features, of_chunk))
            parts.append({name: array[: len(chunk)] for name, array in outputs.items()})
        if not parts:
            shapes = self.output_shapes(features, explain=classes is not None)
            return {name: np.zeros((0, *shape), np.float32) for name, shape in shapes.items()}
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _check_batch(self, images: np.ndarray, features: str, classes: np.ndarray | None) -> None:
        if images.dtype not in (np.uint8, np.uint16) or images.shape[1:] != self.image_shape:
            raise UserError(
                f"images are {images.dtype}{list(images.shape)}; expected uint8 or uint16 {['b', *self.image_shape]}, "
                "as preprocess gives them."
            )
        if features and features not in FEATURES:
            raise UserError(f"features is {features!r}; expected {' or '.join(FEATURES)}.")
        if (features or classes is not None) and len(self.image_shape) != 3:
            what = "features need" if features else "an explanation needs"
            raise UserError(f"{what} a single crop, but config.eval.crops is 10; set it to 1.")
        if classes is not None and classes.shape != (len(images),):
            raise UserError(f"classes has shape {classes.shape}; expected one class for each of {len(images)} images.")
        if classes is not None and not np.all((classes >= BEST_CLASS) & (classes < len(self.class_names))):
            raise UserError(f"classes is {classes.tolist()}; expected numbers from 0 to {len(self.class_names) - 1}.")

    def _answer(
        self, variables: dict[str, Any], images: jax.Array, classes: jax.Array | None = None, features: str = ""
    ) -> dict[str, jax.Array]:
        model = self.model
        seen = functools.partial(normalize, mean=model.mean, std=model.std, dtype=model.dtype)
        step = make_predict_step(model.module, seen, classes=model.allowed_classes, many_labels=model.many_labels)
        outputs = step(variables, {"image": images})
        if features:
            # The compiler merges this with the classification above, so the network runs once.
            activations: Any = model.module.clone(output=features).apply(variables, seen(images), train=False)
            pyramid = features == "pyramid"
            outputs |= (
                {f"stride_{key}": part for key, part in activations.items()} if pyramid else {"pooled": activations}
            )
        if classes is not None:
            classes = jnp.where(classes == BEST_CLASS, jnp.argmax(outputs["probability"], axis=-1), classes)
            outputs["class_id"] = classes
            outputs["map"] = activation_maps(model.module, variables, seen(images), classes)
        return {name: array.astype(jnp.float32) for name, array in outputs.items()}
