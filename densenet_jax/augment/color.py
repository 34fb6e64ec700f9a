"""Random brightness, contrast and saturation on the accelerator."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from densenet_jax.augment.basic import Images, Pixels, to_float, uniforms

BRIGHTNESS, CONTRAST, SATURATION = 0, 1, 2


def luma(images: Images) -> Float[Array, "b h w 1"]:
    """Computes ITU-R 601 gray (0.2989, 0.587, 0.114 of red, green, blue); returns non-RGB channels as they are."""
    if images.shape[-1] != 3:
        return images
    red, green, blue = (images[..., channel : channel + 1] for channel in range(3))
    return 0.2989 * red + 0.587 * green + 0.114 * blue


def adjust_color(images: Images, operations: Int[Array, " b"], factors: Float[Array, " b"]) -> Images:
    """Applies one color operation per image: factor * image + (1 - factor) * reference, clipped to [0, 1].

    The reference is black (BRIGHTNESS), the mean of the image's gray (CONTRAST) or the gray image (SATURATION), as in
    torchvision's adjust_brightness, adjust_contrast and adjust_saturation. Images are in [0, 1], of one or three
    channels.
    """
    operation, factor = (per_image[:, None, None, None] for per_image in (operations, factors))
    gray = luma(images)
    mean = jnp.mean(gray, axis=(1, 2, 3), keepdims=True)
    reference = jnp.where(operation == BRIGHTNESS, 0.0, jnp.where(operation == CONTRAST, mean, gray))
    return jnp.clip(factor * images + (1.0 - factor) * reference, 0.0, 1.0)


def color_jitter(
    images: Pixels, keys: Key[Array, " b"], *, brightness: float = 0.4, contrast: float = 0.4, saturation: float = 0.4
) -> Images:
    """Changes brightness, contrast and saturation of each image in a random order (torchvision's ColorJitter).

    Each strength v draws a factor uniform in [max(0, 1 - v), 1 + v]; only three channels have a saturation. Returns
    floats in [0, 1].
    """
    strengths = jnp.asarray((brightness, contrast, saturation), jnp.float32)[None, :]
    numbers = uniforms(keys, 6)
    orders = jnp.argsort(numbers[:, :3], axis=1)
    low, high = jnp.maximum(0.0, 1.0 - strengths), 1.0 + strengths
    factors = low + (high - low) * numbers[:, 3:]
    images = to_float(images)
    for place in range(3):
        operations = orders[:, place]
        chosen = jnp.take_along_axis(factors, operations[:, None], axis=1)[:, 0]
        images = adjust_color(images, operations, chosen.astype(images.dtype))
    return images
