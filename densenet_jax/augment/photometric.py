"""Pillow's tone and blend operations on the accelerator, on whole numbers held as float32.

Pixels of 8 bits give Pillow's answers. Those of 16 are looked up in the same tables of 256 levels, interpolated.
Every operation is computed for the whole batch; for examples that don't use it, it is exactly the identity.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from densenet_jax.augment.basic import Images

LEVELS = 256


def histogram(images: Images) -> Float[Array, "b c 256"]:
    """Counts how often each value 0 to 255 occurs in each channel of each image.

    On accelerators a value is 16 * high + low, and counting pairs is a product of two narrow one-hot matrices, which
    needs no scatter. On a CPU the scatter is ten times as fast.
    """
    size, height, width, channels = images.shape
    flat = images.reshape(size, height * width, channels).astype(jnp.int32)
    return jax.lax.platform_dependent(flat, cpu=_histogram_by_scatter, default=_histogram_by_product)


def _histogram_by_product(flat: Int[Array, "b p c"]) -> Float[Array, "b c 256"]:
    high = jax.nn.one_hot(flat // 16, 16, dtype=jnp.bfloat16)
    low = jax.nn.one_hot(flat % 16, 16, dtype=jnp.bfloat16)
    counts = jnp.einsum("bpch,bpcl->bchl", high, low, preferred_element_type=jnp.float32)
    return counts.reshape(flat.shape[0], flat.shape[2], LEVELS)


def _histogram_by_scatter(flat: Int[Array, "b p c"]) -> Float[Array, "b c 256"]:
    def count(values: Int[Array, " p"]) -> Float[Array, " 256"]:
        return jnp.zeros(LEVELS, jnp.float32).at[values].add(1.0)

    return jax.vmap(jax.vmap(count, in_axes=1))(flat)


def look_up(images: Images, tables: Float[Array, "b c 256"]) -> Images:
    """Replaces each value by its channel's table entry."""
    size, height, width, channels = images.shape
    places = images.reshape(size, height * width, channels).astype(jnp.int32)
    return jnp.take_along_axis(jnp.swapaxes(tables, 1, 2), places, axis=1).reshape(images.shape)


def look_up_wide(images: Images, levels: Images, tables: Float[Array, "b c 256"]) -> Images:
    """Replaces each 16-bit value, which lies between `levels` and the next ones, by what lies between their entries."""
    first, second = look_up(levels, tables), look_up(jnp.minimum(levels + 1.0, LEVELS - 1.0), tables)
    return jnp.rint(257.0 * first + (images - 257.0 * levels) * (second - first))


def _values() -> Float[Array, "1 1 256"]:
    return jnp.arange(LEVELS, dtype=jnp.float32)[None, None, :]


def auto_contrast_tables(counts: Float[Array, "b c 256"]) -> Float[Array, "b c 256"]:
    """Stretches the values that occur to 0 to 255 (ImageOps.autocontrast)."""
    occurs = counts > 0
    low = jnp.argmax(occurs, axis=-1, keepdims=True).astype(jnp.float32)
    high = LEVELS - 1.0 - jnp.argmax(occurs[..., ::-1], axis=-1, keepdims=True).astype(jnp.float32)
    scale = 255.0 / jnp.maximum(high - low, 1.0)
    # The small number keeps rounding errors from truncating exact integers to the next lower value.
    stretched = jnp.clip(jnp.floor((_values() - low) * scale + 1e-4), 0.0, 255.0)
    return jnp.where(high > low, stretched, _values())


def equalize_tables(counts: Float[Array, "b c 256"]) -> Float[Array, "b c 256"]:
    """Flattens the histogram (ImageOps.equalize)."""
    last = LEVELS - 1 - jnp.argmax((counts > 0)[..., ::-1], axis=-1)
    total = jnp.sum(counts, axis=-1)
    of_last = jnp.take_along_axis(counts, last[..., None], axis=-1)[..., 0]
    step = jnp.floor((total - of_last) / 255.0)[..., None]
    before = jnp.cumsum(counts, axis=-1) - counts
    divided = jnp.floor((jnp.floor(step / 2) + before) / jnp.maximum(step, 1.0))
    return jnp.where(step > 0, jnp.minimum(divided, 255.0), _values())


def posterize_tables(bits: Float[Array, " b"]) -> Float[Array, "b 1 256"]:
    """Keeps the `bits` highest bits (ImageOps.posterize)."""
    lost = jnp.exp2(8.0 - bits)[:, None, None]
    return jnp.floor(_values() / lost) * lost


def solarize_tables(thresholds: Float[Array, " b"]) -> Float[Array, "b 1 256"]:
    """Inverts values from the threshold on (ImageOps.solarize)."""
    return jnp.where(_values() < thresholds[:, None, None], _values(), 255.0 - _values())


def solarize_add_tables(added: Float[Array, " b"]) -> Float[Array, "b 1 256"]:
    """Brightens the lower half of the values."""
    return jnp.where(_values() < 128.0, jnp.minimum(_values() + added[:, None, None], 255.0), _values())


def gray(images: Images) -> Float[Array, "b h w 1"]:
    """Converts RGB to gray as Pillow does, exactly in float32; returns other channel counts as they are."""
    if images.shape[-1] != 3:
        return images
    red, green, blue = (images[..., channel : channel + 1] for channel in range(3))
    return jnp.floor((red * 19595.0 + green * 38470.0 + blue * 7471.0 + 32768.0) / 65536.0)


def smoothed(images: Images) -> Images:
    """Applies Pillow's SMOOTH filter (weights 1 around 5, over 13), except at the border."""
    height, width = images.shape[1:3]
    if min(height, width) < 3:
        return images
    rows = images[:, :-2] + images[:, 1:-1] + images[:, 2:]
    around = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]
    inner = jnp.floor((around + 4.0 * images[:, 1:-1, 1:-1]) / 13.0 + 0.5)
    return images.at[:, 1:-1, 1:-1].set(inner)


def blend(references: Images, images: Images, factors: Float[Array, " b"], white: float) -> Images:
    """Blends like Pillow: reference + factor * (image - reference), clipped and truncated to integers."""
    blended = references + factors[:, None, None, None] * (images - references)
    return jnp.floor(jnp.clip(blended, 0.0, white))


def choose(which: Int[Array, " b"], index: int, ndim: int) -> Bool[Array, "..."]:
    """Returns where `which` is `index`, shaped to broadcast over arrays of `ndim` axes."""
    return (which == index).reshape((-1,) + (1,) * (ndim - 1))
