"""Trains timm's network on the same pictures with the same settings in PyTorch; scikit-learn computes the scores.

    python examples/many_labels/with_torch.py DIR SEED [balanced]

Prints one JSON object. Needs torch, timm and scikit-learn.
"""

import csv
import json
import math
import pathlib
import sys

import cv2
import numpy as np
import timm
import torch
from sklearn.metrics import average_precision_score, roc_auc_score
from torch.nn import functional

EPOCHS, WARMUP_EPOCHS, BATCH, RATE = 20, 1, 64, 0.1


def read(directory: pathlib.Path, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns normalized pictures [n, 1, 16, 16] and labels [n, 10], NaN for unknown."""
    with open(directory / "labels.csv", newline="", encoding="utf-8") as file:
        rows = [row for row in csv.reader(file) if row[1] == split]
    pictures = [cv2.imread(str(directory / row[0]), cv2.IMREAD_GRAYSCALE) for row in rows]
    labels = np.array([[float(label or "nan") for label in row[2:]] for row in rows], np.float32)
    pixels = (np.stack(pictures)[:, None].astype(np.float32) / 255 - 0.305) / 0.376
    return torch.from_numpy(pixels), torch.from_numpy(labels)


def make_network() -> torch.nn.Module:
    """Makes timm's DenseNet-BC of the paper's CIFAR form: three blocks of three layers, growth rate 12."""
    network = timm.models.densenet.DenseNet(growth_rate=12, block_config=(3, 3, 3), in_chans=1, num_classes=10)
    network.features.conv0 = torch.nn.Conv2d(1, 24, 3, padding=1, bias=False)
    network.features.norm0 = network.features.pool0 = torch.nn.Identity()
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, mode="fan_out")  # as the paper's authors
    torch.nn.init.zeros_(network.classifier.bias)
    return network


def crop_at_random(pixels: torch.Tensor) -> torch.Tensor:
    """Pads by one pixel of black and crops back at random."""
    black = -0.305 / 0.376
    padded = functional.pad(pixels, (1, 1, 1, 1), value=black)
    places = torch.randint(0, 3, (len(pixels), 2))
    return torch.stack(
        [image[:, y : y + 16, x : x + 16] for image, (y, x) in zip(padded, places.tolist(), strict=True)]
    )


def main() -> None:
    """Trains, then scores the test pictures."""
    directory, seed, balanced = pathlib.Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:] == ["balanced"]
    torch.manual_seed(seed)
    pixels, labels = read(directory, "train")
    weights = torch.nansum(1 - labels, 0) / torch.nansum(labels, 0) if balanced else torch.ones(10)
    network = make_network()
    optimizer = torch.optim.SGD(network.parameters(), RATE, momentum=0.9, nesterov=True, weight_decay=1e-4)
    steps_per_epoch = len(pixels) // BATCH
    total, warmup = EPOCHS * steps_per_epoch, WARMUP_EPOCHS * steps_per_epoch

    def rate_factor(step: int) -> float:
        return step / warmup if step < warmup else (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate_factor)
    for _ in range(EPOCHS):
        order = torch.randperm(len(pixels))[: steps_per_epoch * BATCH].split(BATCH)
        for chosen in order:
            known = ~torch.isnan(labels[chosen])
            losses = functional.binary_cross_entropy_with_logits(
                network(crop_at_random(pixels[chosen])),
                torch.nan_to_num(labels[chosen]),
                reduction="none",
                pos_weight=weights,
            )
            optimizer.zero_grad()
            (losses[known].sum() / known.sum()).backward()
            optimizer.step()
            schedule.step()
    network.eval()
    pixels, labels = read(directory, "test")
    with torch.no_grad():
        scores = torch.sigmoid(torch.cat([network(part) for part in pixels.split(250)])).numpy()
    print(
        json.dumps(
            {
                "auroc": roc_auc_score(labels, scores, average="macro"),
                "average_precision": average_precision_score(labels, scores, average="macro"),
            }
        )
    )


if __name__ == "__main__":
    main()
