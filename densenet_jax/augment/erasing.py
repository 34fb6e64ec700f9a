"""Random erasing on the accelerator (arXiv:1708.04896)."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from densenet_jax.augment.basic import uniforms, whole_below

Span = tuple[float, float]  # lowest and highest
_ATTEMPTS = 10


def erase_boxes(
    keys: Key[Array, " b"], height: int, width: int, *, probability: float, area: Span, aspect: Span
) -> Int[Array, "b 4"]:
    """Draws one box per example: top, left, height, width in pixels; height and width 0 where nothing is erased.

    As in timm and torchvision, the area is uniform and the aspect (height over width) log-uniform; a box as high or as
    wide as the image is redrawn up to ten times, then dropped.
    """
    numbers = uniforms(keys, 2 * _ATTEMPTS + 3)
    share = area[0] + (area[1] - area[0]) * numbers[:, :_ATTEMPTS]
    log_low, log_high = map(math.log, aspect)
    ratio = jnp.exp(log_low + (log_high - log_low) * numbers[:, _ATTEMPTS : 2 * _ATTEMPTS])
    pixels = share * (height * width)
    sides = jnp.stack([jnp.sqrt(pixels * ratio), jnp.sqrt(pixels / ratio)], axis=-1)
    sides = jnp.round(sides).astype(jnp.int32)
    fits = jnp.all(sides < jnp.asarray((height, width), jnp.int32)[None, None, :], axis=-1)
    first = jnp.argmax(fits, axis=1)[:, None]
    use, corner = numbers[:, -3:-2], numbers[:, -2:]
    used = jnp.take_along_axis(fits, first, axis=1) & (use < probability)
    box = jnp.where(used, jnp.take_along_axis(sides, first[..., None], axis=1)[:, 0], 0)
    free = jnp.asarray((height, width), jnp.int32)[None, :] - box
    return jnp.concatenate([whole_below(corner, free + 1), box], axis=1)


def inside_boxes(boxes: Int[Array, "b 4"], height: int, width: int) -> Bool[Array, "b h w 1"]:
    """Returns a mask of the pixels in each example's box (top, left, height, width)."""
    top, left, box_height, box_width = (boxes[:, part, None] for part in range(4))
    rows, columns = jnp.arange(height)[None, :], jnp.arange(width)[None, :]
    in_rows = (rows >= top) & (rows < top + box_height)
    in_columns = (columns >= left) & (columns < left + box_width)
    return (in_rows[:, :, None] & in_columns[:, None, :])[..., None]


def random_erase(
    images: Float[Array, "b h w c"],
    keys: Key[Array, " b"],
    *,
    probability: float = 0.25,
    area: Span = (0.02, 1 / 3),
    aspect: Span = (0.3, 1 / 0.3),
    mode: str = "pixel",
) -> Float[Array, "b h w c"]:
    """Overwrites a random rectangle of some images, which are normalized: the noise has mean 0 and variance 1.

    Args:
        probability: that an image loses a rectangle.
        area: the rectangle's share of the image, lowest and highest.
        aspect: its height over its width, lowest and highest.
        mode: "zero" (the mean image), "color" (one normal number a channel) or "pixel" (one a value).
    """
    height, width, channels = images.shape[1:]
    box_keys, noise_keys = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
    boxes = erase_boxes(box_keys, height, width, probability=probability, area=area, aspect=aspect)
    inside = inside_boxes(boxes, height, width)
    if mode == "zero":
        return jnp.where(inside, jnp.zeros((), images.dtype), images)
    shape = (1, 1, channels) if mode == "color" else (height, width, channels)
    noise = jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(noise_keys)
    return jnp.where(inside, noise.astype(images.dtype), images)
