"""Bootstrap intervals: how much the scores would differ on other examples of the same kind."""

from collections.abc import Iterator

import numpy as np

from densenet_jax.scores import ranking
from densenet_jax.scores.classes import ClassScores, mean_known
from densenet_jax.scores.labels import threshold_scores

DRAWS = 1000
_MOST_ENTRIES = 2**22  # counts held at once: bounds the memory
Intervals = dict[str, np.ndarray]


def draw_counts(groups: np.ndarray, draws: int, seed: int) -> Iterator[np.ndarray]:
    """Draws all groups anew with replacement, and yields how often a draw has each example, int64 [some draws, n].

    `groups` [n] are drawn as a whole, such as a patient's examples; all different, they draw single examples.
    """
    names, members = np.unique(groups, return_inverse=True)
    generator = np.random.default_rng(seed)
    step = max(1, _MOST_ENTRIES // max(1, len(members)))
    for start in range(0, draws, step):
        count = min(step, draws - start)
        picked = generator.integers(0, len(names), (count, len(names))) + len(names) * np.arange(count)[:, None]
        yield np.bincount(picked.ravel(), minlength=count * len(names)).reshape(count, -1)[:, members.ravel()]


def label_intervals(
    scores: np.ndarray,
    targets: np.ndarray,
    thresholds: np.ndarray | float = 0.0,
    *,
    groups: np.ndarray | None = None,
    draws: int = DRAWS,
    seed: int = 0,
) -> Intervals:
    """Computes intervals of 95% of each label's scores and of their mean over the labels with both kinds of examples.

    Args:
        scores: float [n, k], logits or probabilities.
        targets: float [n, k]: 1, 0, or NaN for unknown.
        thresholds: [k] or one, in the unit of `scores`.
        groups: [n], examples that are drawn together; None draws single examples.

    Returns:
        {"auroc", "average_precision", "f1", "sensitivity", "specificity"}: float64 [k + 1, 2], low and high, the mean
        in the last row. A draw in which a label has one kind of example only says nothing about that label.
    """
    known, positive = ~np.isnan(targets), targets > 0
    ranked = [ranking.rank_label(scores[:, label], targets[:, label]) for label in range(scores.shape[1])]
    hits = (scores >= thresholds) & known
    kinds = [hits & positive, hits & ~positive, positive, known & ~positive]
    drawn: dict[str, list[np.ndarray]] = {}
    for counts in draw_counts(np.arange(len(scores)) if groups is None else groups, draws, seed):
        curves = [ranking.count_curve(each, counts) for each in ranked]
        values = {
            "auroc": np.stack([ranking.auroc(curve) for curve in curves], axis=-1),
            "average_precision": np.stack([ranking.average_precision(curve) for curve in curves], axis=-1),
            **threshold_scores(*(counts.astype(float) @ kind for kind in kinds)),
        }
        for name, column in values.items():
            drawn.setdefault(name, []).append(np.concatenate([column, mean_known(column)[..., None]], axis=-1))
    return {name: _percentiles(np.concatenate(parts)) for name, parts in drawn.items()}


def class_intervals(
    true: np.ndarray, predicted: np.ndarray, classes: int, *, groups: np.ndarray | None = None, draws: int = DRAWS
) -> Intervals:
    """Computes intervals of 95% of accuracy, balanced accuracy and F1.

    Args:
        true: int [n] class numbers, as `predicted`.
        groups: [n], examples that are drawn together; None draws single examples.

    Returns:
        {"top1", "balanced_accuracy", "f1"}: float64 [2], low and high; NaN without examples.
    """
    if not len(true):
        return {name: np.full(2, np.nan) for name in ("top1", "balanced_accuracy", "f1")}
    codes, pair_of, pairs = np.unique(true * np.int64(classes) + predicted, return_inverse=True, return_counts=True)
    parts = []
    for counts in _draw_pairs(pair_of, pairs, groups, draws, max(len(codes), classes)):
        sums = _sum_by_class(counts, codes // classes, codes % classes, classes)
        parts.append(ClassScores.from_counts(*sums).means())
    return {name: _percentiles(np.concatenate([part[name] for part in parts])) for name in parts[0]}


def _draw_pairs(
    pair_of: np.ndarray, pairs: np.ndarray, groups: np.ndarray | None, draws: int, width: int
) -> Iterator[np.ndarray]:
    """Yields how often a draw has each pair of classes, int64 [some draws, pairs].

    Drawing n single examples with replacement draws the counts of pairs from a multinomial distribution.
    """
    if groups is not None:
        for counts in draw_counts(groups, draws, 0):
            yield np.stack([np.bincount(pair_of, weights=row, minlength=len(pairs)) for row in counts]).astype(np.int64)
        return
    generator, total = np.random.default_rng(0), int(pairs.sum())
    step = max(1, _MOST_ENTRIES // max(1, width))
    for start in range(0, draws, step):
        yield generator.multinomial(total, pairs / max(1, total), size=min(step, draws - start))


def _sum_by_class(
    counts: np.ndarray, true: np.ndarray, predicted: np.ndarray, classes: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sums counts of pairs [draws, pairs] to examples, predictions and right ones of each class [draws, classes]."""
    sums = np.zeros((3, classes, len(counts)), np.int64)
    for into, where, chosen in ((0, true, slice(None)), (1, predicted, slice(None)), (2, true, true == predicted)):
        np.add.at(sums[into], where[chosen], counts.T[chosen])
    return sums[0].T, sums[1].T, sums[2].T


def _percentiles(values: np.ndarray) -> np.ndarray:
    """Returns low and high [..., 2] of the draws (first axis) that are not NaN."""
    empty = np.all(np.isnan(values), axis=0)
    filled = np.where(empty, 0.0, values)
    limits = np.nanpercentile(filled, (2.5, 97.5), axis=0)
    return np.moveaxis(np.where(empty, np.nan, limits), 0, -1)
