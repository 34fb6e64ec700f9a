"""Scores of labels and classes beside scikit-learn's."""

import numpy as np
import pytest
from sklearn import metrics

from densenet_jax.scores import ranking
from densenet_jax.scores.classes import ClassScores
from densenet_jax.scores.labels import score_labels

CASES = range(40)


def random_case(seed):
    """Scores with few or many ties, and targets of which some are unknown and some columns have one kind only."""
    generator = np.random.default_rng(seed)
    n, k = int(generator.integers(2, 60)), int(generator.integers(1, 6))
    scores = generator.normal(size=(n, k)).astype(np.float32 if seed % 2 else np.float64)
    if seed % 3:
        scores = np.round(scores, seed % 3 - 1)
    targets = (generator.random((n, k)) < generator.random(k)).astype(np.float32)
    targets[generator.random((n, k)) < generator.choice([0, 0.3])] = np.nan
    return scores, targets, float(generator.choice([0.5, 0.8, 0.9, 0.95, 1.0]))


def expected_scores(scores, targets, threshold, specificity):
    """scikit-learn's scores of one label."""
    scores, targets = scores[~np.isnan(targets)], targets[~np.isnan(targets)]
    predicted = scores >= threshold
    false, true, _ = metrics.roc_curve(targets, scores, drop_intermediate=False)
    return {
        "auroc": metrics.roc_auc_score(targets, scores),
        "average_precision": metrics.average_precision_score(targets, scores),
        "f1": metrics.f1_score(targets, predicted, zero_division=0),
        "sensitivity": metrics.recall_score(targets, predicted),
        "specificity": metrics.recall_score(targets, predicted, pos_label=0),
        "sensitivity_at_specificity": true[1 - false >= specificity - 1e-9].max(),
    }


@pytest.mark.parametrize("seed", CASES)
def test_scores_are_those_of_scikit_learn(seed):
    scores, targets, specificity = random_case(seed)
    thresholds = np.linspace(-0.5, 0.5, scores.shape[1])
    ours = score_labels(scores, targets, thresholds, specificity=specificity)
    expected = []
    for label, threshold in enumerate(thresholds):
        own = targets[:, label]
        counts = (ours.positives[label], ours.negatives[label], ours.unknown[label])
        assert counts == ((own == 1).sum(), (own == 0).sum(), np.isnan(own).sum())
        if ours.is_scored[label]:
            expected.append(expected_scores(scores[:, label], own, threshold, specificity))
            for name, value in expected[-1].items():
                assert getattr(ours, name)[label] == pytest.approx(value, abs=1e-9), name
        else:
            assert all(np.isnan(column[label]) for column in ours[3:])
    for name, value in ours.means().items():
        assert value == pytest.approx(np.mean([one[name] for one in expected]) if expected else np.nan, nan_ok=True)


def test_labels_with_one_kind_of_example_are_left_out_of_the_means():
    targets = np.array([[1, 1, 0, np.nan], [0, 1, 0, np.nan], [1, np.nan, 0, np.nan]])
    ours = score_labels(np.array([[2.0] * 4, [1.0] * 4, [3.0] * 4]), targets)
    assert ours.is_scored.tolist() == [True, False, False, False]
    assert ours.means()["auroc"] == 1.0
    assert ours.unknown.tolist() == [0, 1, 0, 3]


def test_a_score_that_is_not_a_number_is_not_hidden():
    ours = score_labels(np.array([[np.nan, 1.0], [0.0, 0.0]]), np.array([[1, 1], [0, 0]]))
    assert np.isnan(ours.auroc[0])
    assert ours.auroc[1] == 1.0
    assert np.isnan(ours.means()["auroc"])


def test_no_examples_at_all():
    assert np.isnan(score_labels(np.zeros((0, 2)), np.zeros((0, 2))).means()["auroc"])


@pytest.mark.parametrize("seed", CASES)
def test_a_fitted_threshold_reaches_what_it_was_fitted_for(seed):
    scores, targets, specificity = random_case(seed)
    for label in range(scores.shape[1]):
        own, known = targets[:, label], ~np.isnan(targets[:, label])
        ranked = ranking.rank_label(scores[:, label], own)
        best, specific = ranking.best_f1_threshold(ranked), ranking.specific_threshold(ranked, specificity)
        if len(np.unique(own[known])) < 2:
            assert np.isnan([best, specific]).all()
            continue
        all_f1 = [metrics.f1_score(own[known], scores[known, label] >= cut) for cut in np.unique(scores[known, label])]
        assert metrics.f1_score(own[known], scores[known, label] >= best) == pytest.approx(max(all_f1))
        reached = score_labels(scores[:, [label]], own[:, None], specific, specificity=specificity)
        assert reached.specificity[0] >= specificity - 1e-9
        assert reached.sensitivity[0] == pytest.approx(reached.sensitivity_at_specificity[0])


@pytest.mark.parametrize("seed", range(10))
def test_class_scores_are_those_of_scikit_learn(seed):
    generator = np.random.default_rng(seed)
    true, predicted = generator.integers(0, 5, (2, 30))
    counts = np.zeros((7, 7), np.int64)  # two classes have neither examples nor predictions
    np.add.at(counts, (true, predicted), 1)
    means = ClassScores.from_confusion(counts).means()
    assert means["top1"] == pytest.approx(metrics.accuracy_score(true, predicted), abs=1e-12)
    assert means["balanced_accuracy"] == pytest.approx(metrics.balanced_accuracy_score(true, predicted), abs=1e-12)
    assert means["f1"] == pytest.approx(metrics.f1_score(true, predicted, average="macro"), abs=1e-12)
