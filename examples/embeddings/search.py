"""Searches the digits nearest to a digit by the pooled features of a trained run, and by raw pixels for comparison.

    python main.py --config configs/digits.py --workdir runs/digits
    python -m examples.embeddings.search runs/digits

Searched are the 1,437 digits that the run was trained on; the 360 held-out ones are the queries, as they are and moved
by one of their eight pixels. Recall at 1 is the share of queries whose nearest neighbor shows the same digit.
"""

import argparse

import numpy as np
from sklearn.datasets import load_digits

import densenet_jax
from densenet_jax.data.digits import TEST_EXAMPLES, stratified_test_indices

MOVES = {"as they are": (0, 0), "moved right": (0, 1), "moved left": (0, -1), "moved down": (1, 0), "moved up": (-1, 0)}


def move(images, rows, columns):
    """Moves images [n, h, w] by rows and columns; what leaves is lost, and what enters is black."""
    height, width = images.shape[1:]
    padded = np.pad(images, ((0, 0), (abs(rows),) * 2, (abs(columns),) * 2))
    top, left = abs(rows) - rows, abs(columns) - columns
    return padded[:, top : top + height, left : left + width]


def unit(vectors):
    """Scales rows to length 1, so that their products are cosines."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def recall_at_1(index, index_labels, queries, labels):
    """Returns the share of queries whose most similar row of the index, by cosine, has the query's label."""
    nearest = np.argmax(unit(queries) @ unit(index).T, axis=1)
    return float(np.mean(index_labels[nearest] == labels))


def main(workdir):
    """Prints recall at 1 for every move and returns {move: (by features, by pixels)}."""
    predictor = densenet_jax.Predictor.from_workdir(workdir)
    digits = load_digits()
    images, labels = np.round(digits.images * (255 / 16)).astype(np.uint8), digits.target
    held_out = stratified_test_indices(labels, TEST_EXAMPLES)
    searched = np.setdiff1d(np.arange(len(labels)), held_out)
    index = predictor.features(list(images[searched]))
    print(f"{len(searched)} digits, {index.shape[1]} features each, beside {images[0].size} pixels\nrecall at 1")
    results = {}
    for name, (rows, columns) in MOVES.items():
        queries = move(images[held_out], rows, columns)
        results[name] = tuple(
            recall_at_1(vectors, labels[searched], wanted, labels[held_out])
            for vectors, wanted in (
                (index, predictor.features(list(queries))),
                (images[searched].reshape(len(searched), -1) / 255, queries.reshape(len(queries), -1) / 255),
            )
        )
        print(f"  {name:<12} features {results[name][0]:.3f}, pixels {results[name][1]:.3f}")
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("workdir", help="a run of configs/digits.py")
    main(parser.parse_args().workdir)
