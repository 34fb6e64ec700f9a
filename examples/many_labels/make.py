"""Writes a data set with several labels from scikit-learn's handwritten digits.

    python examples/many_labels/make.py DIR

Each picture of 16x16 pixels has four fields, and each field is empty or holds one of the 1,797 real digits. Its ten
labels say which digits are in it. High digits are rare (a 9 is in 4% of the training pictures, a 0 in 57%), and a tenth
of the training labels is unknown. No digit is in pictures of two splits.
"""

import csv
import pathlib
import sys

import cv2
import numpy as np
from sklearn.datasets import load_digits

SPLITS = {"train": (0, 1100, 1500), "validation": (1100, 1437, 600), "test": (1437, 1797, 1000)}  # digits, pictures
FREQUENCY = 0.7 ** np.arange(10)  # of a digit among the filled fields
FILLED = 0.6  # share of the fields
UNKNOWN = 0.1  # share of the labels of training pictures


def main() -> None:
    """Writes DIR/labels.csv and DIR/pictures/*.png."""
    directory = pathlib.Path(sys.argv[1])
    (directory / "pictures").mkdir(parents=True)
    digits = load_digits()
    draws = np.random.default_rng(0)
    with open(directory / "labels.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(("path", "split", *(f"digit {digit}" for digit in range(10))))
        for split, (first, last, pictures) in SPLITS.items():
            pools = [np.flatnonzero(digits.target[first:last] == digit) + first for digit in range(10)]
            for number in range(pictures):
                picture, present = np.zeros((16, 16)), np.zeros(10, int)
                for field in range(4):
                    if draws.random() < FILLED:
                        digit = draws.choice(10, p=FREQUENCY / FREQUENCY.sum())
                        row, column = 8 * (field // 2), 8 * (field % 2)
                        picture[row : row + 8, column : column + 8] = digits.images[draws.choice(pools[digit])]
                        present[digit] = 1
                labels = present.astype(str)
                if split == "train":
                    labels = np.where(draws.random(10) < UNKNOWN, "", labels)
                path = f"pictures/{split}_{number:04d}.png"
                cv2.imwrite(str(directory / path), np.round(picture * 255 / 16).astype(np.uint8))
                table.writerow((path, split, *labels))


if __name__ == "__main__":
    main()
