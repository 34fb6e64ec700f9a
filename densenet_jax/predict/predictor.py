"""The model as a function of images, for use from Python.

predictor = densenet_jax.Predictor.from_workdir("runs/digits")
for answers in predictor(["three.png", "eight.png"]):
    print(answers[0].label, answers[0].probability)
"""

import dataclasses
import logging
import math
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from densenet_jax.config.run_settings import read_run_settings
from densenet_jax.data.batches import available_cores
from densenet_jax.data.pixels import join
from densenet_jax.data.records import DamagedImage
from densenet_jax.predict.compiled import BATCH_SIZES, BEST_CLASS, CompiledModel
from densenet_jax.predict.explain import Explanation
from densenet_jax.predict.images import (
    DEFAULT_LIMITS,
    ImageError,
    ImageLimits,
    ImageSource,
    load_image,
    name_of,
    read_encoded,
)
from densenet_jax.predict.model import Deployed, make_deployed, make_deployed_from_pretrained

logger = logging.getLogger(__name__)
_DARK = (
    "%s has 16 bits and no value above %d of 65535, so that it is almost black; "
    "config.data.pixel_range names the stored values that are black and white."
)


class ClassProbability(NamedTuple):
    """A class with its number, name and probability in [0, 1]."""

    class_id: int
    label: str
    probability: float


class Predictor(CompiledModel):
    """Predicts images from files, bytes or arrays, preprocessed as in evaluation. Safe to call from many threads.

    Attributes:
        model: module, weights and preprocessing.
        limits: sizes above which an image is rejected.
    """

    def __init__(
        self, model: Deployed, *, batch_sizes: Sequence[int] = BATCH_SIZES, limits: ImageLimits = DEFAULT_LIMITS
    ) -> None:
        """As `CompiledModel`; images above `limits` are rejected."""
        super().__init__(model, batch_sizes)
        self.limits = limits
        self._has_warned = False

    @classmethod
    def from_workdir(
        cls,
        workdir: str | os.PathLike[str],
        checkpoint: str = "latest",
        labels: str = "",
        *,
        dtype: str = "",
        **options: Any,
    ) -> "Predictor":
        """Loads the model of a run.

        Args:
            checkpoint: "latest", "best" or a step.
            labels: file with one class name a line; "" uses the run's own names.
            dtype: as `config.model.dtype`; "" is the run's own.
            **options: passed to the constructor.

        Raises:
            UserError: there is no such checkpoint, or its settings can't be read.
        """
        path = os.fspath(workdir)
        overrides = {"eval.checkpoint": str(checkpoint)} | ({"model.dtype": dtype} if dtype else {})
        config = read_run_settings(path, overrides)
        return cls(make_deployed(config, path, labels), **options)

    @classmethod
    def from_pretrained(
        cls,
        name: str,
        source: str,
        labels: str = "",
        *,
        many_labels: bool = False,
        dtype: str = "float32",
        **options: Any,
    ) -> "Predictor":
        """Loads a published or local checkpoint with its own preprocessing.

        Args:
            name: variant, such as "densenet121".
            source: hub id or file, as in `densenet_jax.load_pretrained`.
            labels: file with one class name a line; "" uses ImageNet's names for 1,000 classes.
            many_labels: the outputs are labels, each with a probability of its own, as those of a file with
                torchxrayvision's thresholds are in any case.
            dtype: as `config.model.dtype`.
            **options: passed to the constructor.

        Raises:
            UserError: there is no such variant or checkpoint.
        """
        model = make_deployed_from_pretrained(name, source, labels, dtype)
        return cls(dataclasses.replace(model, many_labels=many_labels or model.many_labels), **options)

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
            kind: "pooled" for the classifier's input, "pyramid" for the last feature map of every stage, or strides
                such as "stride_2,stride_8", of which 2 is the stem's before its pooling.

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

    def explain(
        self, images: Iterable[ImageSource], classes: Sequence[int] | None = None, *, layer: str = ""
    ) -> list[Explanation]:
        """Computes a class activation map for each image: where in the image the evidence for a class is.

        Args:
            classes: class of each image; None takes the most probable ones.
            layer: computes Grad-CAM (arXiv:1610.02391) at this inner layer instead, such as "stride_8": finer, but no
                exact share of the logit. The layers are the levels of the feature pyramid.

        Raises:
            ImageError: an image is rejected.
            UserError: a class or layer does not exist, or the model evaluates ten crops.
        """
        pixels = self._preprocess_all(images)
        chosen = np.full(len(pixels), BEST_CLASS, np.int32) if classes is None else np.asarray(classes, np.int32)
        outputs = self._in_chunks(pixels, classes=chosen, layer=layer)
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
                decoding = {"pixel_range": transform.pixel_range, "bits": transform.bits}
                pixels = load_image(image, transform.channels, name=name, limits=self.limits, **decoding)
                return transform.of_pixels(pixels)
            pixels = transform(read_encoded(image, name, self.limits), name=name)
            highest = int(pixels.max()) if pixels.dtype == np.uint16 and not transform.pixel_range else 0
            if 0 < highest < 65536 // 16 and not self._has_warned:
                self._has_warned = True
                logger.warning(_DARK, name, highest)
            return pixels
        except DamagedImage as error:
            raise ImageError(name, error.why) from error
        except MemoryError as error:
            raise ImageError(name, "there is not enough memory to decode it") from error

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

    def best(self, probabilities: np.ndarray, topk: int = 5) -> list[ClassProbability]:
        """Returns the `topk` highest of float32 [classes], best first; ties are in class order.

        If images have many labels, all are returned.
        """
        order = np.argsort(-probabilities, kind="stable")[: None if self.model.many_labels else topk]
        if self.model.allowed_classes is not None:
            order = order[: len(self.model.allowed_classes)]
        return [ClassProbability(int(i), self.class_names[i], float(probabilities[i])) for i in order]

    def is_predicted(self, answer: ClassProbability) -> bool:
        """Returns whether one of many labels is predicted: by its threshold, else if it is more likely than not."""
        threshold = self.thresholds[answer.class_id] if self.thresholds is not None else math.nan
        return answer.probability >= (0.5 if math.isnan(threshold) else threshold)

    def _preprocess_all(self, images: Iterable[ImageSource]) -> np.ndarray:
        with ThreadPoolExecutor(available_cores()) as pool:
            done = list(pool.map(self.preprocess, images))
        return join(done) if done else np.zeros((0, *self.image_shape), self._dtype)
