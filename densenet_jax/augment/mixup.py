"""Mixup and cutmix on the accelerator: mixes pairs of examples and their labels."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, Shaped

from densenet_jax.augment.basic import uniforms, whole_below
from densenet_jax.augment.erasing import inside_boxes
from densenet_jax.errors import UserError
from densenet_jax.rng import example_keys


def partners(array: Shaped[Array, "b ..."], distance: int = 1) -> Shaped[Array, "b ..."]:
    """Returns each example's partner by swapping neighboring blocks of `distance` examples.

    The order of examples is random already, and no example has to leave its device as long as a device holds a multiple
    of `2 * distance` examples.

    Raises:
        UserError: `2 * distance` does not divide the batch.
    """
    size = array.shape[0]
    if size % (2 * distance):
        raise UserError(
            f"config.train.global_batch_size is {size}; mixup and cutmix pair examples and expect a multiple of "
            f"{2 * distance}."
        )
    blocks = array.reshape(size // (2 * distance), 2, distance, *array.shape[1:])
    return blocks[:, ::-1].reshape(array.shape)


def cut_boxes(
    centers: Int[Array, "b 2"], shares: Float[Array, " b"], height: int, width: int
) -> tuple[Int[Array, "b 4"], Float[Array, " b"]]:
    """Computes boxes around `centers` (row, column) with sides sqrt(1 - share) of the image's, cut off at its border.

    Returns top, left, height and width of each box, and the share of the image outside it.
    """
    size = jnp.asarray((height, width), jnp.int32)[None, :]
    half = (size * jnp.sqrt(1.0 - shares)[:, None]).astype(jnp.int32) // 2
    low, high = jnp.clip(centers - half, 0, size), jnp.clip(centers + half, 0, size)
    outside = 1.0 - jnp.prod(high - low, axis=1).astype(jnp.float32) / (height * width)
    return jnp.concatenate([low, high - low], axis=1), outside


def mix(
    images: Float[Array, "b h w c"],
    labels: Int[Array, " b"] | Float[Array, "b k"],
    key: Key[Array, ""],
    *,
    num_classes: int,
    mixup_alpha: float = 0.0,
    cutmix_alpha: float = 0.0,
    probability: float = 1.0,
    cutmix_share: float = 0.5,
    per_example: bool = False,
    pair_distance: int = 1,
) -> tuple[Float[Array, "b h w c"], Float[Array, "b k"]]:
    """Mixes each example with its partner by mixup (arXiv:1710.09412) or cutmix (arXiv:1905.04899), as timm does.

    With share l ~ Beta(alpha, alpha), mixup gives l * own + (1 - l) * partner; cutmix puts the partner's pixels into a
    box of about 1 - l of the area, whose true area then corrects l. Labels are mixed with the same l. Images are
    floats, mixed in float32 at least and returned in their dtype, with the class probabilities, float32 [b, k],
    unsmoothed.

    Many labels an image are mixed one by one; one that is unknown (NaN) in either image is unknown in the mixture,
    unless that image has no share in it.

    Args:
        labels: class numbers, or many labels an image.
        mixup_alpha: 0 turns mixup off.
        cutmix_alpha: 0 turns cutmix off.
        probability: that anything is mixed at all.
        cutmix_share: where both are on, how often it is cutmix.
        per_example: draws everything for each example instead of once a batch.
        pair_distance: see `partners`; more than 1 where neighbors are copies of one image (repeated augmentation).
    """
    size, height, width, _ = images.shape
    many = labels.ndim == 2
    targets = labels if many else jax.nn.one_hot(labels, num_classes, dtype=jnp.float32)
    if mixup_alpha <= 0.0 and cutmix_alpha <= 0.0:
        return images, targets
    keys = example_keys(key, size) if per_example else example_keys(key, 1)
    share_of_cutmix = 0.0 if cutmix_alpha <= 0.0 else 1.0 if mixup_alpha <= 0.0 else cutmix_share

    draw_keys, beta_keys = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
    numbers = uniforms(draw_keys, 4)
    used, cut = numbers[:, 0] < probability, numbers[:, 1] < share_of_cutmix
    alpha = jnp.where(cut, cutmix_alpha, mixup_alpha).astype(jnp.float32)
    share = jnp.where(used, jax.vmap(lambda key, a: jax.random.beta(key, a, a))(beta_keys, alpha), 1.0)
    centers = whole_below(numbers[:, 2:], jnp.asarray((height, width), jnp.int32)[None, :])
    boxes, outside = cut_boxes(centers, share, height, width)
    own_label = jnp.where(cut, outside, share)[:, None]
    inside = inside_boxes(boxes, height, width)
    own_pixel = jnp.where(cut[:, None, None, None], jnp.where(inside, 0.0, 1.0), share[:, None, None, None])
    mixed = (own_pixel * images + (1.0 - own_pixel) * partners(images, pair_distance)).astype(images.dtype)
    both = own_label * targets + (1.0 - own_label) * partners(targets, pair_distance)
    if many:  # 0 times unknown is unknown, too
        both = jnp.where(own_label == 1.0, targets, both)
        both = jnp.where(own_label == 0.0, partners(targets, pair_distance), both)
    return mixed, both
