"""Scores of classes and calibration, against scikit-learn and a plain recount."""

import itertools

import numpy as np
import pytest
from sklearn.metrics import precision_recall_fscore_support

from densenet_jax.report.gather import Answers
from densenet_jax.report.per_class import per_class_rows, to_csv
from densenet_jax.scores.calibration import Reliability
from densenet_jax.scores.classes import ClassScores


def test_scores_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    labels, predicted = rng.integers(0, 5, 200), rng.integers(1, 6, 200)  # class 0 is never predicted, 5 never true
    answers = Answers(np.stack([labels, predicted]), (), Reliability())
    scores, matrix = answers.scores(7), answers.matrix(7)
    from_matrix = ClassScores.from_counts(matrix.sum(axis=1), matrix.sum(axis=0), np.diag(matrix))
    expected = precision_recall_fscore_support(labels, predicted, labels=range(7), zero_division=np.nan)
    for ours, same, theirs in zip(scores[2:], from_matrix[2:], expected, strict=False):
        np.testing.assert_array_equal(ours, same)
        np.testing.assert_allclose(ours, theirs, atol=1e-12)
    np.testing.assert_array_equal(scores.examples, expected[3])
    rows = list(per_class_rows(scores, [f"name, {number}" for number in range(7)], [6, 0]))
    assert rows[1] == [6, "name, 6", 0, 0, "", "", "", ""]
    assert to_csv(rows[1:2]) == b'6,"name, 6",0,0,,,,\n'
    assert to_csv([["carriage\rreturn", 1], ["line\nbreak", 2]]) == b'"carriage\rreturn",1\n"line\nbreak",2\n'


@pytest.mark.parametrize("parts", [1, 3])
def test_calibration_error_is_that_of_a_recount(parts):
    rng = np.random.default_rng(1)
    confidence = np.append(rng.uniform(0, 1, 997), [0.0, 1.0, 1 / 15])
    right = rng.uniform(0, 1, 1000) < confidence**2
    reliability = Reliability()
    for part in np.array_split(np.arange(1000), parts):
        reliability.add(confidence[part], right[part])
    expected = 0.0
    edges = np.linspace(0, 1, 16)
    for low, high in itertools.pairwise(edges):
        inside = (confidence > low) & (confidence <= high) | (confidence == 0) & (low == 0)
        expected += abs(right[inside].mean() - confidence[inside].mean()) * inside.mean()
    assert abs(reliability.expected_calibration_error - expected) < 1e-12
    assert reliability.counts.sum() == 1000
    assert np.isnan(Reliability().expected_calibration_error)
