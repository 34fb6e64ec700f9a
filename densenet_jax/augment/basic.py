"""Normalizes, flips and crops images on the accelerator, inside the jitted step.

Every random choice depends on one key per example, so an image looks the same on any number of devices and after a
resume.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, Shaped, UInt8, UInt16


def uniforms(keys: Key[Array, " b"], count: int) -> Float[Array, "b {count}"]:
    """Draws `count` float32 numbers in [0, 1) for each key; one draw for a whole augmentation is cheap."""
    return jax.vmap(lambda key: jax.random.uniform(key, (count,), jnp.float32))(keys)


def whole_below(numbers: Float[Array, "..."], limits: Int[Array, "..."] | int) -> Int[Array, "..."]:
    """Converts numbers in [0, 1) to equally likely integers in [0, limit), for limits up to some thousands."""
    return jnp.floor(numbers * limits).astype(jnp.int32)


Images = Float[Array, "b h w c"]
Pixels = UInt8[Array, "b h w c"] | UInt16[Array, "b h w c"] | Images  # floats are in [0, 1]


def white_of(images: jax.Array) -> float:
    """Returns the value of white: 255, 65535, or 1 for floats."""
    return float(jnp.iinfo(images.dtype).max) if jnp.issubdtype(images.dtype, jnp.unsignedinteger) else 1.0


def to_float(images: Pixels) -> Float[Array, "b h w c"]:
    """Converts whole numbers to float32 in [0, 1]; returns floats as they are."""
    white = white_of(images)
    return images if white == 1.0 else images.astype(jnp.float32) / white


def normalize(
    images: Pixels, mean: Sequence[float], std: Sequence[float], dtype: jax.typing.DTypeLike = jnp.float32
) -> Float[Array, "b h w c"]:
    """Computes (image - mean) / std for each channel; mean and std are for images in [0, 1].

    Computes in float32, or in float64 where `dtype`, the result's, is.
    """
    exact = jnp.promote_types(dtype, jnp.float32)
    scale = white_of(images)
    shape = (1, 1, 1, len(mean))
    mean_array = np.asarray(mean, np.float64).reshape(shape) * scale
    std_array = np.asarray(std, np.float64).reshape(shape) * scale
    centered = images.astype(exact) - jnp.asarray(mean_array, exact)
    return (centered / jnp.asarray(std_array, exact)).astype(dtype)


def random_flip(images: Shaped[Array, "b h w c"], keys: Key[Array, " b"]) -> Shaped[Array, "b h w c"]:
    """Mirrors each image left to right with probability 1/2."""
    flip = uniforms(keys, 1)[:, :, None, None] < 0.5
    return jnp.where(flip, images[:, :, ::-1, :], images)


def pad_and_crop(images: Shaped[Array, "b h w c"], keys: Key[Array, " b"], pad_px: int) -> Shaped[Array, "b h w c"]:
    """Pads every side with `pad_px` zeros and cuts the original size back out at a random place (CIFAR's, with 4).

    All (2 pad_px + 1)^2 places are equally likely.
    """
    padded = jnp.pad(images, ((0, 0), (pad_px, pad_px), (pad_px, pad_px), (0, 0)))

    corners = whole_below(uniforms(keys, 2), 2 * pad_px + 1)

    def crop(image: Shaped[Array, "h2 w2 c"], corner: Int[Array, " 2"]) -> Shaped[Array, "h w c"]:
        return jax.lax.dynamic_slice(image, (*corner, jnp.zeros_like(corner[0])), images.shape[1:])

    return jax.vmap(crop)(padded, corners)
