"""Affine image transformations on the accelerator, as Pillow samples them."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from densenet_jax.augment.basic import Images


def rotation(degrees: Float[Array, " b"], height: int, width: int) -> Float[Array, "b 6"]:
    """Returns the coefficients of a counter-clockwise rotation about the middle of the image."""
    angle = jnp.deg2rad(degrees)
    cosine, sine = jnp.cos(angle), jnp.sin(angle)
    x, y = width / 2.0, height / 2.0
    return jnp.stack([cosine, -sine, x - cosine * x + sine * y, sine, cosine, y - sine * x - cosine * y], axis=1)


def warp(images: Images, coefficients: Float[Array, "b 6"], fill: Float[Array, " c"]) -> Images:
    """Transforms images affinely and bilinearly: output (x, y) is input (a x + b y + c, d x + e y + f).

    Pixel centers lie at halves, as in Pillow's Image.transform; the identity changes no bit. `coefficients` are a to f
    of each image; `fill` is the color outside the image.
    """
    size, height, width, channels = images.shape
    x = jnp.arange(width, dtype=jnp.float32)[None, None, :] + 0.5
    y = jnp.arange(height, dtype=jnp.float32)[None, :, None] + 0.5
    a, b, c, d, e, f = (coefficients[:, part, None, None] for part in range(6))
    from_x, from_y = a * x + b * y + c, d * x + e * y + f
    inside = (from_x >= 0) & (from_x < width) & (from_y >= 0) & (from_y < height)
    left, top = jnp.floor(from_x - 0.5), jnp.floor(from_y - 0.5)
    share_x, share_y = (from_x - 0.5 - left)[..., None], (from_y - 0.5 - top)[..., None]
    flat = images.reshape(size, height * width, channels)

    def pixels(column: Float[Array, "b h w"], row: Float[Array, "b h w"]) -> Float[Array, "b h w c"]:
        column_index = jnp.clip(column, 0, width - 1).astype(jnp.int32)
        row_index = jnp.clip(row, 0, height - 1).astype(jnp.int32)
        places: Int[Array, "b n"] = (row_index * width + column_index).reshape(size, height * width)
        return jnp.take_along_axis(flat, places[..., None], axis=1).reshape(images.shape)

    upper_left, upper_right = pixels(left, top), pixels(left + 1, top)
    lower_left, lower_right = pixels(left, top + 1), pixels(left + 1, top + 1)
    upper = upper_left + (upper_right - upper_left) * share_x
    lower = lower_left + (lower_right - lower_left) * share_x
    mixed = upper + (lower - upper) * share_y
    return jnp.where(inside[..., None], mixed, fill[None, None, None, :])
