"""Bootstrap intervals beside a plain loop over the draws."""

import numpy as np
import pytest

from densenet_jax.scores import bootstrap
from densenet_jax.scores.classes import ClassScores
from densenet_jax.scores.labels import score_labels


@pytest.fixture(scope="module")
def case():
    generator = np.random.default_rng(0)
    targets = (generator.random((80, 3)) < (0.5, 0.2, 0.0)).astype(float)
    scores = np.round(generator.normal(size=(80, 3)) + targets, 1)
    targets[generator.random((80, 3)) < 0.1] = np.nan
    return scores, targets, np.repeat(np.arange(20), 4)


def test_intervals_are_those_of_scoring_every_draw_by_itself(case, monkeypatch):
    scores, targets, groups = case
    monkeypatch.setattr(bootstrap, "_MOST_ENTRIES", 80 * 7)  # several batches of draws
    ours = bootstrap.label_intervals(scores, targets, 0.2, groups=groups, draws=30, seed=3)
    rows = []
    for counts in np.concatenate(list(bootstrap.draw_counts(groups, 30, 3))):
        again = np.repeat(np.arange(80), counts)
        rows.append(score_labels(scores[again], targets[again], 0.2))
    for name, interval in ours.items():
        values = np.stack([getattr(row, name) for row in rows])
        values = np.concatenate([values, np.nanmean(values[:, :2], axis=1, keepdims=True)], axis=1)
        for label in (0, 1, 3):
            np.testing.assert_allclose(interval[label], np.nanpercentile(values[:, label], (2.5, 97.5)), atol=1e-12)
        assert np.isnan(interval[2]).all()


def test_groups_are_drawn_as_a_whole_and_draws_follow_from_the_seed(case):
    groups = case[2]
    counts = np.concatenate(list(bootstrap.draw_counts(groups, 50, 1)))
    assert (counts.reshape(50, 20, 4) == counts.reshape(50, 20, 4)[:, :, :1]).all()
    assert (counts.sum(axis=1) == 80).all()
    np.testing.assert_array_equal(counts, np.concatenate(list(bootstrap.draw_counts(groups, 50, 1))))
    assert (counts != np.concatenate(list(bootstrap.draw_counts(groups, 50, 2)))).any()


def test_groups_widen_the_interval_of_examples_that_repeat(case):
    scores, targets, _ = case
    scores, targets, groups = np.repeat(scores, 5, axis=0), np.repeat(targets, 5, axis=0), np.repeat(np.arange(80), 5)
    alone, together = (bootstrap.label_intervals(scores, targets, groups=by)["auroc"][0] for by in (None, groups))
    assert np.diff(together)[0] > 1.8 * np.diff(alone)[0]  # expected: the square root of five


def test_class_intervals_are_those_of_drawing_examples():
    generator = np.random.default_rng(0)
    confusion = generator.integers(0, 6, (4, 4)) + 20 * np.eye(4, dtype=int)
    true, predicted = np.repeat(np.argwhere(confusion >= 0), confusion.ravel(), axis=0).T
    values = []
    for again in generator.integers(0, len(true), (2000, len(true))):
        counts = np.zeros((4, 4), int)
        np.add.at(counts, (true[again], predicted[again]), 1)
        scores = ClassScores.from_confusion(counts)
        values.append(list(scores.means().values()))
    ours = bootstrap.class_intervals(true, predicted, 4, draws=2000)
    alone = bootstrap.class_intervals(true, predicted, 4, groups=np.arange(len(true)), draws=2000)
    pairs = bootstrap.class_intervals(true.repeat(2), predicted.repeat(2), 4, groups=np.arange(len(true)).repeat(2))
    twice = bootstrap.class_intervals(true.repeat(2), predicted.repeat(2), 4)
    for name, interval in ours.items():
        np.testing.assert_allclose(alone[name], interval, atol=0.01)
        assert 1.25 < np.diff(pairs[name])[0] / np.diff(twice[name])[0] < 1.6  # expected: the square root of two
    assert list(ours) == ["top1", "balanced_accuracy", "f1"]
    np.testing.assert_allclose(np.stack(list(ours.values())), np.percentile(values, (2.5, 97.5), axis=0).T, atol=0.01)


def test_nothing_to_draw_from_has_no_interval():
    ours = bootstrap.label_intervals(np.zeros((3, 1)), np.full((3, 1), np.nan), draws=5)
    assert np.isnan(ours["auroc"]).all()
    nobody = np.zeros(0, int)
    assert np.isnan(bootstrap.class_intervals(nobody, nobody, 3)["top1"]).all()
