"""Two photographs that ship with scikit-learn, with masks of what stands before the background.

A flower before leaves; a tower and trees before sky and water. Nobody drew the masks: OpenCV's GrabCut made them from
the colors, and they were looked at.
"""

import itertools

import cv2
import numpy as np
from sklearn.datasets import load_sample_image

CROP_PX = 96


def load_halves():
    """Returns (gray pixels float32[2, h, w] in [0, 1], masks bool[2, h, w]) of the left and of the right halves."""
    pixels, masks = [], []
    for name in ("flower.jpg", "china.jpg"):
        photo = load_sample_image(name)
        red, green, blue = (photo[..., channel].astype(int) for channel in range(3))
        likely = red > green + 40 if name == "flower.jpg" else (blue <= 150) | (blue < red - 5)
        mask = np.where(likely, cv2.GC_PR_FGD, cv2.GC_PR_BGD).astype(np.uint8)
        cv2.setRNGSeed(0)
        cv2.grabCut(photo, mask, None, np.zeros((1, 65)), np.zeros((1, 65)), 5, cv2.GC_INIT_WITH_MASK)
        masks.append(np.isin(mask, (cv2.GC_FGD, cv2.GC_PR_FGD)))
        pixels.append(cv2.cvtColor(photo, cv2.COLOR_RGB2GRAY).astype(np.float32) / 255)
    middle = pixels[0].shape[1] // 2
    both = np.stack(pixels), np.stack(masks)
    return tuple(part[:, :, :middle] for part in both), tuple(part[:, :, middle:] for part in both)


def draw_crops(draws, halves, count):
    """Draws crops (pixels, masks), each [count, CROP_PX, CROP_PX], half of them mirrored."""
    photos, *sides = halves[0].shape
    crops = []
    for _ in range(count):
        photo, (y, x) = draws.integers(photos), (draws.integers(side - CROP_PX + 1) for side in sides)
        crop = [part[photo, y : y + CROP_PX, x : x + CROP_PX] for part in halves]
        crops.append([part[:, ::-1] for part in crop] if draws.random() < 0.5 else crop)
    return tuple(np.stack(parts) for parts in zip(*crops, strict=True))


def tile(photos):
    """Cuts photographs [n, h, w] into crops [m, CROP_PX, CROP_PX] side by side."""
    corners = [range(0, side - CROP_PX + 1, CROP_PX) for side in photos.shape[1:]]
    return np.concatenate([photos[:, y : y + CROP_PX, x : x + CROP_PX] for y, x in itertools.product(*corners)])
