"""Segments photographs with a small U-Net over the feature pyramid of a DenseNet.

    python -m examples.segmentation.unet [--steps 300] [--save masks.png]

It learns on crops of the left halves of two photographs and is judged on crops of the right halves, beside the best
decision by a pixel's gray level alone. The masks come from colors (photographs.py), but the network sees gray pixels.
"""

import argparse

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

import densenet_jax
from examples.segmentation.photographs import CROP_PX, draw_crops, load_halves, tile


class UNet(nn.Module):
    """Goes from the last feature map back to the image: resize, concatenate the stage before, convolve."""

    encoder: nn.Module  # its output is {stride: features float[b, h / stride, w / stride, c]}
    width: int = 16

    @nn.compact
    def __call__(self, images, train=False):
        """Returns a logit of each pixel, float[b, h, w], of images float[b, h, w, c]."""
        stages = self.encoder(images, train)
        last, *earlier = sorted(stages, reverse=True)
        x = stages[last]
        for skip in (*(stages[stride] for stride in earlier), images):
            x = jax.image.resize(x, (*skip.shape[:3], x.shape[-1]), "bilinear")
            x = nn.relu(nn.Conv(self.width, (3, 3))(jnp.concatenate([x, skip], axis=-1)))
        return nn.Conv(1, (1, 1))(x)[..., 0]


def normalize(pixels):
    """Returns images float32[n, h, w, 1] of pixels in [0, 1]."""
    return ((pixels - 0.5) / 0.25)[..., None]


def fit(halves, steps, batch_size=8, seed=0):
    """Trains on random crops; returns the network, its variables and the loss of each step."""
    encoder = densenet_jax.create_model("densenet121", growth_rate=12, block_sizes=(2, 2, 2, 2), output="pyramid")
    unet, draws = UNet(encoder), np.random.default_rng(seed)
    key = jax.random.key(seed, impl="rbg")  # compiles in a fraction of the default's time
    variables = jax.jit(unet.init)(key, jnp.zeros((1, CROP_PX, CROP_PX, 1)))
    optimizer = optax.adamw(optax.cosine_decay_schedule(3e-3, steps))
    state = (variables["params"], variables["batch_stats"], optimizer.init(variables["params"]))

    @jax.jit
    def step(params, stats, moments, images, masks):
        def loss_of(params):
            logits, new = unet.apply({"params": params, "batch_stats": stats}, images, True, mutable=["batch_stats"])
            return optax.sigmoid_binary_cross_entropy(logits, masks).mean(), new["batch_stats"]

        (loss, stats), gradients = jax.value_and_grad(loss_of, has_aux=True)(params)
        updates, moments = optimizer.update(gradients, moments, params)
        return (optax.apply_updates(params, updates), stats, moments), loss

    losses = []
    for _ in range(steps):
        pixels, masks = draw_crops(draws, halves, batch_size)
        state, loss = step(*state, normalize(pixels), masks.astype(np.float32))
        losses.append(float(loss))
    return unet, {"params": state[0], "batch_stats": state[1]}, losses


def predict_by_gray_level(halves, pixels):
    """Predicts masks from each pixel's level alone: foreground where most training pixels of that level are."""
    levels, new = ((part * 255).round().astype(int) for part in (halves[0], pixels))
    counts, foreground = (np.bincount(levels.ravel(), weights, 256) for weights in (None, halves[1].ravel()))
    return (foreground > counts / 2)[new]


def intersection_over_union(predicted, masks):
    """Returns the pixels that both call foreground over those that either does."""
    return float((predicted & masks).sum() / (predicted | masks).sum())


def main(steps=300, save=""):
    """Trains, prints both IoUs over the held-out crops, and returns (the network's, the baseline's)."""
    train, held_out = load_halves()
    unet, variables, losses = fit(train, steps)
    pixels, masks = (tile(part) for part in held_out)
    predicted = np.asarray(jax.jit(unet.apply)(variables, normalize(pixels))) > 0
    by_level = predict_by_gray_level(train, pixels)
    ours, baseline = (intersection_over_union(mask, masks) for mask in (predicted, by_level))
    print(f"{len(masks)} held-out crops, loss {losses[0]:.3f} to {losses[-1]:.3f} in {steps} steps")
    print(f"IoU of the U-Net {ours:.3f}, of gray levels alone {baseline:.3f}")
    if save:
        rows = [np.hstack(part) for part in (pixels, masks, predicted)]
        cv2.imwrite(save, (255 * np.vstack(rows)).astype(np.uint8))
    return ours, baseline


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--save", default="", help="picture of the held-out crops, their masks and the predictions")
    main(**vars(parser.parse_args()))
