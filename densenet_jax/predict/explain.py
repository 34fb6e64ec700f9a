"""Class activation maps and Grad-CAM: where in an image the evidence for a class is."""

import functools
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int
from PIL import Image

from densenet_jax.data.pixels import to_picture
from densenet_jax.dtypes import wide
from densenet_jax.errors import report_write_errors
from densenet_jax.models.head import INTERMEDIATES, PERTURBATIONS
from densenet_jax.models.layers import convolve
from densenet_jax.models.rdnet import RDNet, spread_norm

Inputs = Float[Array, "b height width c"]  # normalized images
_LEAST_PX = 320  # shorter side of an overlay
_STRONGEST = 0.75  # opacity of the overlay at the highest value
_COLOR = np.array([213, 94, 0], np.float32)  # vermilion, which color-blind people can tell from gray


class Explanation(NamedTuple):
    """A class and the evidence for it in an image."""

    class_id: int
    label: str
    probability: float  # in [0, 1]
    # float32 [h, w], over the image as the model is given it; its mean plus `bias` is the logit. With a layer it is
    # Grad-CAM's map of that layer instead, which has no negative values and no such sum.
    activation_map: np.ndarray
    bias: float  # the classifier's bias of the class


def activation_maps(
    module: nn.Module, variables: dict[str, Any], inputs: Inputs, classes: Int[Array, " b"]
) -> Float[Array, "b h w"]:
    """Computes the class activation map (arXiv:1512.04150) of one class for each normalized image.

    The head averages the last feature map and multiplies it by a matrix, so the order can be exchanged: the mean of the
    activation map plus the bias of the class is its logit, up to rounding. An RDNet's norm between the two is linear
    but for its division by one number an image. With test-time pooling, whose logits are only half made of averages,
    the maps are those of a plain average.
    """
    features: Any = module.clone(output="map").apply(variables, inputs, train=False)
    if isinstance(module, RDNet):
        features = spread_norm(features, **variables["params"]["norm"], epsilon=module.epsilon)
    kernel = variables["params"]["classifier"]["kernel"]
    weights = jnp.take(kernel, classes, axis=1).astype(features.dtype)
    kind = wide(features.dtype)
    return jnp.einsum("bhwc,cb->bhw", features, weights, precision="highest", preferred_element_type=kind)


def logits_and_maps(
    module: nn.Module, variables: dict[str, Any], inputs: Inputs
) -> tuple[Float[Array, "b k"], Float[Array, "b h w k"]]:
    """Computes the logits of normalized images and, in the same pass, the class activation maps of all classes."""
    state: dict[str, Any]
    logits, state = module.apply(variables, inputs, train=False, mutable=[INTERMEDIATES])  # type: ignore[assignment]
    levels = state[INTERMEDIATES]
    (features,) = levels[max(levels, key=lambda name: int(name.removeprefix("stride_")))]
    if isinstance(module, RDNet):
        features = spread_norm(features, **variables["params"]["norm"], epsilon=module.epsilon)
    kernel = variables["params"]["classifier"]["kernel"].astype(features.dtype)
    return logits, convolve(features, kernel[None, None])


def layer_names(module: nn.Module, variables: dict[str, Any], image_shape: tuple[int, ...]) -> list[str]:
    """Names the layers that Grad-CAM can look at, "stride_4" and so on: the levels of the pyramid; computes nothing."""
    apply = functools.partial(module.clone(output="pyramid").apply, train=False)
    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    return [f"stride_{stride}" for stride in jax.eval_shape(apply, variables, image)]


def weigh_by_gradients(
    module: nn.Module, variables: dict[str, Any], inputs: Inputs, classes: Int[Array, " b"], layer: str
) -> Float[Array, "b h w"]:
    """Computes Grad-CAM (arXiv:1610.02391, equations 1 and 2) before its ReLU, for one class of each normalized image.

    It is that of `layer`, one of `layer_names`. The weight of a feature map is the mean over its positions of the
    gradient of the class's logit. At the last layer this is the class activation map divided by the number of its
    positions.
    """
    # Kernels and fused parts may have no gradient in evaluation.
    plain: Any = type(module)
    module = module.clone(output="logits", implementation=plain.implementation)
    levels = functools.partial(module.apply, train=False, mutable=[INTERMEDIATES])

    def logits(perturbations: dict[str, Any]) -> tuple[Array, Array]:
        each, state = levels({**variables, PERTURBATIONS: perturbations}, inputs)
        chosen = jnp.take_along_axis(each, classes[:, None].astype(jnp.int32), axis=1)
        return jnp.sum(chosen), state[INTERMEDIATES][layer][0]

    shape: Any = jax.eval_shape(levels, variables, inputs)[1][INTERMEDIATES][layer][0]
    gradients, activations = jax.grad(logits, has_aux=True)({layer: jnp.zeros(shape.shape, shape.dtype)})
    kind = wide(shape.dtype)
    weights = jnp.mean(gradients[layer], axis=(1, 2), dtype=kind)
    return jnp.einsum("bhwc,bc->bhw", activations.astype(kind), weights, precision="highest")


def draw_overlay(pixels: np.ndarray, activation_map: np.ndarray) -> Image.Image:
    """Draws the positive part of an activation map, float [h, w], in red over integer pixels [height, width, c]."""
    image = to_rgb(pixels)
    scale = max(1, -(-_LEAST_PX // min(image.size)))
    small = min(image.size) < _LEAST_PX // 4
    size = (image.width * scale, image.height * scale)
    image = image.resize(size, Image.Resampling.NEAREST if small else Image.Resampling.BICUBIC)
    positive = np.maximum(activation_map, 0).astype(np.float32)
    heat = Image.fromarray(positive / max(float(positive.max()), np.finfo(np.float32).tiny))
    shares = np.clip(np.asarray(heat.resize(size, Image.Resampling.BICUBIC)), 0, 1)[..., None]
    opacity = _STRONGEST * shares
    return Image.fromarray(np.rint((1 - opacity) * np.asarray(image) + opacity * _COLOR).astype(np.uint8))


def to_rgb(pixels: np.ndarray) -> Image.Image:
    """Converts integer pixels [h, w, c] of any number of channels to a color image; others than 3 become gray."""
    pixels = to_picture(pixels)
    return Image.fromarray(np.repeat(pixels, 3 // pixels.shape[2], axis=2))


def write_explanation(picture_path: str, array_path: str, pixels: np.ndarray, activation_map: np.ndarray) -> None:
    """Writes the overlay as a PNG and the activation map as a .npy file.

    Raises:
        UserError: they can't be written.
    """
    with report_write_errors(picture_path, "change --explain"):
        os.makedirs(os.path.dirname(picture_path) or ".", exist_ok=True)
        np.save(array_path, activation_map)
        draw_overlay(pixels, activation_map).save(picture_path, "PNG")
