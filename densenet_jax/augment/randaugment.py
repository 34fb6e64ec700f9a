"""RandAugment on the accelerator (arXiv:1909.13719), with timm's "rand-m9-mstd0.5-inc1" operations.

An accelerator computes every branch of a choice that differs between examples, so fifteen operations would cost fifteen
passes. They are three instead: a table look-up (six operations), a blend (four) and an affine warp (five), each the
identity for examples that did not draw it. Two layers at 224 px cost 26 ms an image on two busy CPU cores; not measured
on accelerators.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, UInt8, UInt16

from densenet_jax.augment import photometric as tones
from densenet_jax.augment.affine import rotation, warp
from densenet_jax.augment.basic import Images, uniforms, white_of, whole_below

OPERATIONS = (
    *("auto_contrast", "equalize", "invert", "posterize", "solarize", "solarize_add"),  # looked up in tables
    *("color", "contrast", "brightness", "sharpness"),  # blends
    *("shear_x", "shear_y", "translate_x", "translate_y", "rotate"),  # warps
)
NOTHING = len(OPERATIONS)
HIGHEST_LEVEL = 10.0
Choices = Int[Array, " b"]
Numbers = Float[Array, " b"]
Whole = UInt8[Array, "b h w c"] | UInt16[Array, "b h w c"]


def _pick(operations: Choices, choices: dict[str, Array], otherwise: Array) -> Array:
    """Selects for each example the array of its operation, else `otherwise`."""
    result = otherwise
    for name, array in choices.items():
        result = jnp.where(tones.choose(operations, OPERATIONS.index(name), otherwise.ndim), array, result)
    return result


def _apply_tone(images: Images, operations: Choices, share: Numbers, white: float) -> Images:
    is_wide = white > 255.0
    levels = jnp.floor((images + 0.5) / 257.0) if is_wide else images
    counts = tones.histogram(levels)
    identity = jnp.broadcast_to(jnp.arange(256, dtype=jnp.float32)[None, None, :], counts.shape)
    choices = {
        "auto_contrast": tones.auto_contrast_tables(counts),
        "equalize": tones.equalize_tables(counts),
        "invert": 255.0 - identity,
        "posterize": tones.posterize_tables(4.0 - jnp.floor(share * 4.0)),
        "solarize": tones.solarize_tables(256.0 - jnp.floor(share * 256.0)),
        "solarize_add": tones.solarize_add_tables(jnp.floor(share * 110.0)),
    }
    tables = _pick(operations, choices, identity)
    return tones.look_up_wide(images, levels, tables) if is_wide else tones.look_up(images, tables)


def _apply_blend(images: Images, operations: Choices, signed_share: Numbers, white: float) -> Images:
    gray = tones.gray(images)
    mean = jnp.floor(jnp.mean(gray, axis=(1, 2, 3), keepdims=True) + 0.5)
    black, smooth = jnp.zeros_like(mean), tones.smoothed(images)
    choices = {"color": gray, "contrast": mean, "brightness": black, "sharpness": smooth}
    references = _pick(operations, choices, images)
    return tones.blend(references, images, jnp.maximum(0.1, 1.0 + 0.9 * signed_share), white)


def _apply_warp(images: Images, operations: Choices, signed_share: Numbers, fill: Float[Array, " c"]) -> Images:
    height, width = images.shape[1:3]
    identity = jnp.broadcast_to(jnp.asarray([1.0, 0, 0, 0, 1, 0])[None, :], (images.shape[0], 6))
    choices = {
        "shear_x": identity.at[:, 1].set(0.3 * signed_share),
        "shear_y": identity.at[:, 3].set(0.3 * signed_share),
        "translate_x": identity.at[:, 2].set(0.45 * width * signed_share),
        "translate_y": identity.at[:, 5].set(0.45 * height * signed_share),
        "rotate": rotation(30.0 * signed_share, height, width),
    }
    coefficients = _pick(operations, choices, identity)
    # Pillow truncates to integers; the small number keeps rounding errors from lowering exact ones.
    return jnp.floor(warp(images, coefficients, fill) + 1e-3)


def apply_operations(
    images: Whole, operations: Choices, levels: Numbers, signs: Numbers, fill: Sequence[float]
) -> Whole:
    """Applies one operation per image, within one level of Pillow's (sampling rounds differently now and then).

    Images of 16 bits keep them.

    Args:
        operations: index into `OPERATIONS`; `NOTHING` changes nothing.
        levels: strength in [0, 10].
        signs: 1 or -1: the direction of warps, more or less of blends.
        fill: color outside the image for warps, 0 to 255.
    """
    floats, white = images.astype(jnp.float32), white_of(images)
    share = levels / HIGHEST_LEVEL
    floats = _apply_tone(floats, operations, share, white)
    floats = _apply_blend(floats, operations, signs * share, white)
    outside = jnp.asarray([value * white / 255.0 for value in fill], jnp.float32)
    floats = _apply_warp(floats, operations, signs * share, outside)
    return floats.astype(images.dtype)


def rand_augment(
    images: Whole,
    keys: Key[Array, " b"],
    *,
    num_layers: int = 2,
    magnitude: float = 9.0,
    magnitude_std: float = 0.5,
    probability: float = 0.5,
    fill: Sequence[float] = (124.0, 116.0, 104.0),
) -> Whole:
    """Applies `num_layers` random operations, drawn with repetition, to each image of one or three channels.

    Args:
        magnitude: mean strength, in [0, 10]; every operation gets stronger with it.
        magnitude_std: standard deviation of the strength, which is cut to [0, 10].
        probability: that a drawn operation is applied at all.
        fill: color outside the image for warps, 0 to 255; timm's is the data's mean.
    """
    fill = tuple(fill)[: images.shape[-1]]
    numbers = uniforms(keys, 4 * num_layers)
    for layer in range(num_layers):
        drawn, used, side, strength = (numbers[:, 4 * layer + part] for part in range(4))
        operations = jnp.where(used < probability, whole_below(drawn, len(OPERATIONS)), NOTHING)
        levels = magnitude + magnitude_std * jax.scipy.special.ndtri(strength)
        levels = jnp.clip(levels, 0.0, HIGHEST_LEVEL)
        images = apply_operations(images, operations, levels, jnp.where(side < 0.5, -1.0, 1.0), fill)
    return images
