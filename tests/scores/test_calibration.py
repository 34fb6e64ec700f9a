"""Temperatures, thresholds, ECE and Brier scores beside scipy's and scikit-learn's."""

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import softmax
from sklearn import metrics

from densenet_jax.scores import calibration


@pytest.fixture(scope="module")
def classes():
    """Logits of ten classes that are three times too sure, and the true classes."""
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(3000, 10))
    labels = np.array([generator.choice(10, p=row) for row in softmax(logits, axis=-1)])
    return (3 * logits).astype(np.float32), labels


@pytest.fixture(scope="module")
def labels():
    """Logits of labels that are sure by different factors; the last one has no positives."""
    generator = np.random.default_rng(1)
    logits = generator.normal(size=(600, 4))
    targets = (generator.random((600, 4)) < calibration.sigmoid(logits)).astype(np.float64)
    targets[generator.random((600, 4)) < 0.2] = np.nan
    targets[targets[:, 3] == 1, 3] = 0
    return logits * (0.5, 1.0, 4.0, 1.0), targets


def test_a_temperature_undoes_overconfidence_and_is_the_minimum(classes):
    logits, labels = classes
    fitted = calibration.fit_softmax_temperature(logits, labels)
    best = minimize(lambda inverse: calibration.softmax_loss(logits * inverse[0], labels), [1.0], method="L-BFGS-B")
    assert fitted == pytest.approx(1 / best.x[0], rel=1e-3)
    assert fitted == pytest.approx(3, rel=0.15)
    before, after = (calibration.trust_classes(each, labels)[0] for each in (logits, logits / fitted))
    assert after.loss < before.loss
    assert after.ece < before.ece / 3
    assert after.brier < before.brier


def test_losses_are_those_of_scikit_learn(classes, labels):
    logits, true = classes
    expected = metrics.log_loss(true, softmax(logits.astype(np.float64), axis=-1), labels=range(10))
    assert calibration.softmax_loss(logits, true) == pytest.approx(expected, rel=1e-6)
    logits, targets = labels
    known = ~np.isnan(targets)
    expected = metrics.log_loss(targets[known], calibration.sigmoid(logits)[known])
    assert calibration.sigmoid_loss(logits, targets) == pytest.approx(expected)
    assert calibration.sigmoid_loss(np.array([[800.0, -800.0]]), np.array([[0.0, 1.0]])) == 800.0


def test_sigmoid_temperatures_for_all_labels_or_each(labels):
    logits, targets = labels
    together = calibration.fit_sigmoid_temperatures(logits, targets)
    each = calibration.fit_sigmoid_temperatures(logits, targets, each_label=True)
    assert len(set(together)) == 1
    np.testing.assert_allclose(each[:3], (0.5, 1.0, 4.0), rtol=0.4)
    assert each[3] == 1.0
    for label in range(3):
        alone = calibration.fit_sigmoid_temperatures(logits[:, [label]], targets[:, [label]])
        assert each[label] == pytest.approx(alone[0], rel=1e-6)
    losses = [calibration.sigmoid_loss(logits[:, :3] / t, targets[:, :3]) for t in (1.0, together[:3], each[:3])]
    assert losses[0] > losses[1] > losses[2]


def test_thresholds_are_in_the_unit_of_the_scores_and_unknown_without_both_kinds(labels):
    logits, targets = labels
    for specificity in (0.0, 0.9):
        thresholds = calibration.fit_thresholds(logits, targets, specificity)
        probable = calibration.fit_thresholds(calibration.sigmoid(logits), targets, specificity)
        assert np.isnan(thresholds[3])
        for label in range(3):
            by_logit, by_probability = logits[:, label] >= thresholds[label], calibration.sigmoid(logits)[:, label]
            np.testing.assert_array_equal(by_logit, by_probability >= probable[label])
    known = ~np.isnan(targets[:, 0])
    specific = metrics.recall_score(targets[known, 0], (logits[:, 0] >= thresholds[0])[known], pos_label=0)
    assert 0.9 <= specific < 0.92


def test_brier_scores_are_those_of_scikit_learn_and_ece_that_of_a_loop(classes, labels):
    logits, true = classes
    probabilities = softmax(logits.astype(np.float64), axis=-1)
    trust, reliability = calibration.trust_classes(logits, true)
    assert trust.brier == pytest.approx(np.mean(np.sum((probabilities - np.eye(10)[true]) ** 2, axis=1)))
    sure, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == true
    assert trust.ece == pytest.approx(loop_ece(sure, right))
    assert reliability.counts.sum() == 3000
    logits, targets = labels
    trust, reliability = calibration.trust_labels(logits, targets)
    briers, errors = [], []
    for label in range(3):
        known = ~np.isnan(targets[:, label])
        own = calibration.sigmoid(logits)[known, label]
        briers.append(metrics.brier_score_loss(targets[known, label], own))
        errors.append(loop_ece(own, targets[known, label] == 1))
    assert trust.brier == pytest.approx(np.mean(briers))
    assert trust.ece == pytest.approx(np.mean(errors))
    assert reliability.counts.sum() == (~np.isnan(targets)).sum()


def loop_ece(probabilities, right):
    error = 0.0
    for place in range(calibration.BINS):
        inside = (probabilities > place / calibration.BINS) & (probabilities <= (place + 1) / calibration.BINS)
        if inside.any():
            error += abs(right[inside].mean() - probabilities[inside].mean()) * inside.mean()
    return error


def test_answers_that_are_all_right_keep_a_temperature_within_its_limits():
    logits = np.array([[2.0, 0.0], [0.0, 2.0]])
    assert calibration.LIMITS[0] <= calibration.fit_softmax_temperature(logits, np.array([0, 1])) < 0.1
