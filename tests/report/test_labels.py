"""The report's part about many labels, and about a calibration."""

import csv
import json

import numpy as np
import pytest

from densenet_jax.predict.calibration import Calibration
from densenet_jax.report.curves import NONE
from densenet_jax.report.gather import LabelAnswers, LabelMistake, gather_label_answers
from densenet_jax.report.labels import LabelTable
from densenet_jax.report.sections import describe_mistake
from densenet_jax.run.evaluate import predict_batches
from densenet_jax.scores.calibration import sigmoid
from densenet_jax.scores.labels import score_labels
from densenet_jax.training import sharding
from tests.label_run import label_flags, write_label_set
from tests.main_in_process import run_here
from tests.report.reading import Page, replace_charts


def split(examples=21, batch=8):
    """Logits, targets and padded batches whose images carry the example's number."""
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(examples, 3)).astype(np.float32)
    targets = generator.choice(np.float32([0, 1, np.nan]), (examples, 3))
    padded = -(-examples // batch) * batch
    image = np.zeros((padded, 2, 2, 1), np.uint8)
    image[:, 0, 0, 0] = np.arange(padded)
    label = np.zeros((padded, 3), np.float32)
    label[:examples] = targets
    arrays = {"image": image, "label": label, "mask": np.arange(padded) < examples}
    batches = [{name: array[at : at + batch] for name, array in arrays.items()} for at in range(0, padded, batch)]
    return logits, targets, batches


@pytest.mark.parametrize("most", [3, 100])
def test_logits_of_all_examples_and_the_surest_mistakes(most):
    logits, targets, batches = split()

    def step(variables, batch):
        numbers = np.minimum(np.asarray(batch["image"])[:, 0, 0, 0], len(logits) - 1)
        label = np.asarray(batch["label"])
        errors = np.where(np.isnan(label), -np.inf, np.where(label > 0, -1, 1) * logits[numbers])
        worst = errors.argmax(axis=1)
        maps = np.full((len(worst), 1, 1), 0.5, np.float32)
        return {
            "logit": logits[numbers],
            "label": label,
            "mask": np.asarray(batch["mask"]),
            "worst": worst,
            "map": maps,
        }

    predictions = predict_batches(step, {}, batches, sharding.make_mesh(), len(batches))
    answers = gather_label_answers(predictions, most)
    np.testing.assert_array_equal(answers.logits, logits)
    np.testing.assert_array_equal(answers.targets, targets)
    wrong = np.where(targets == 1, -logits, np.where(targets == 0, logits, -np.inf))
    order = [row for row in np.argsort(-wrong.max(axis=1)) if wrong[row].max() > 0][:most]
    assert [mistake.index for mistake in answers.mistakes] == order
    for mistake in answers.mistakes:
        assert mistake.image[0, 0, 0] == mistake.index
        assert mistake.label == wrong[mistake.index].argmax()
        assert mistake.present == (targets[mistake.index, mistake.label] == 1)


@pytest.fixture(scope="module")
def answers():
    generator = np.random.default_rng(0)
    targets = (generator.random((90, 3)) < (0.5, 0.2, 0.0)).astype(np.float32)
    targets[:9, 1] = np.nan
    return LabelAnswers((generator.normal(size=(90, 3)) + np.nan_to_num(targets)).astype(np.float32), targets, ())


def test_the_table_has_scores_at_the_thresholds_with_intervals(answers):
    calibration = Calibration((2.0,), (0.7, np.nan, np.nan))
    table = LabelTable.from_answers(answers, ("a", "b", "c"), np.arange(90) // 3, calibration)
    expected = score_labels(sigmoid(answers.logits / 2.0), answers.targets, np.array([0.7, 0.5, 0.5]))
    for ours, theirs in zip(table.scores, expected, strict=True):
        np.testing.assert_allclose(ours, theirs)
    rows = list(csv.DictReader([",".join(map(str, row)) for row in table.csv_rows()]))
    assert [row["label"] for row in rows] == ["a", "b", "c", "mean"]
    assert [row["unknown"] for row in rows] == ["0", "9", "0", ""]
    for row, label in ((rows[0], 0), (rows[1], 1)):
        assert float(row["auroc"]) == pytest.approx(expected.auroc[label], abs=1e-6)
        assert float(row["auroc_low"]) < float(row["auroc"]) < float(row["auroc_high"])
    assert (rows[2]["auroc"], rows[2]["f1_high"], rows[2]["negatives"]) == ("", "", "90")
    assert float(rows[3]["f1"]) == pytest.approx(expected.f1[:2].mean(), abs=1e-6)
    shown = table.page_rows()
    assert [row[0] for row in shown] == ["mean", *sorted("ab", key=lambda name: expected.auroc["ab".index(name)]), "c"]
    assert shown[3][1:7] == (NONE,) * 5 + ("0.500",)


def test_a_mistake_in_words():
    missed = LabelMistake(np.zeros((2, 2, 1), np.uint8), 0, 1, True, -2.0, np.zeros((1, 1)))
    assert describe_mistake(missed, ("a", "b"), None) == ("b missed", "11.9% for b.")
    assert describe_mistake(missed, ("a", "b"), Calibration((1.0, 2.0)))[1] == "26.9% for b."


def test_a_run_of_labels_has_a_page_before_and_after_its_calibration(tmp_path, user, monkeypatch):
    table, workdir = write_label_set(tmp_path / "data", 60), tmp_path / "run"
    _, errors = run_here(*label_flags(table, train__epochs=1.0), f"--workdir={workdir}", **user)
    assert "could not be written" not in errors
    page = Page((workdir / "report" / "index.html").read_text())
    assert "validation AUROC" in page.text
    rows = list(csv.DictReader((workdir / "report" / "labels.csv").read_text().splitlines()))
    validated = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])
    assert float(rows[-1]["auroc"]) == pytest.approx(validated["auroc"], abs=1e-5)
    assert [row["threshold"] for row in rows[:3]] == ["0.5"] * 3
    run_here("calibrate", f"--workdir={workdir}", **user)
    replace_charts(monkeypatch)
    run_here("report", f"--workdir={workdir}", **user)
    page = Page((workdir / "report" / "index.html").read_text())
    assert "Calibration" in page.text
    calibrated = json.loads((workdir / "calibration.json").read_text())
    assert f"{calibrated['before']['ece']:.4f}" in page.text
    rows = list(csv.DictReader((workdir / "report" / "labels.csv").read_text().splitlines()))
    assert float(rows[0]["threshold"]) == pytest.approx(calibrated["thresholds"][0], abs=1e-6)
    assert (workdir / "report" / "calibration_after.png").exists()
