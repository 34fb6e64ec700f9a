"""Calibration of a finished run: fitted, kept with its checkpoint, and used by every prediction."""

import csv
import json
import math

import jax
import numpy as np
import pytest

from densenet_jax.errors import UserError
from densenet_jax.predict.calibration import read_calibration
from densenet_jax.predict.predictor import Predictor
from densenet_jax.run.calibrate import fit_calibration
from densenet_jax.scores import calibration
from tests.label_run import LABELS, label_flags, write_label_set
from tests.main_in_process import run_here
from tests.main_processes import parse_last_line


def test_a_fit_has_what_was_asked_for():
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(300, 2))
    labels = (generator.random((300, 2)) < calibration.sigmoid(logits)).astype(np.float32)
    fit = fit_calibration(3 * logits, labels)
    assert fit.after.ece < fit.before.ece
    assert fit.after.loss < fit.before.loss
    assert fit.temperatures[0] == fit.temperatures[1]
    each = fit_calibration(logits * (3, 1), labels, each_label=True, specificity=0.9)
    assert each.temperatures[0] > 2 * each.temperatures[1]
    chances = calibration.sigmoid(logits * (3, 1) / each.temperatures)
    for label in range(2):
        negatives = labels[:, label] == 0
        assert 0.9 <= np.mean(chances[negatives, label] < each.thresholds[label]) < 0.93
    single = fit_calibration(3 * logits, (logits[:, 1] > logits[:, 0]).astype(int))
    assert (single.temperatures.shape, single.thresholds.shape) == ((1,), (0,))


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory, user, no_report):
    """The directory of a run, its predictions before it was calibrated, and the last line of that."""
    folder = tmp_path_factory.mktemp("calibrated")
    table = write_label_set(folder / "data", 60)
    run_here(*label_flags(table, train__epochs=3.0), f"--workdir={folder / 'run'}", **user)
    before = predictions(folder / "run", folder / "before.jsonl", user)
    output, errors = run_here("calibrate", f"--workdir={folder / 'run'}", **user)
    return folder / "run", before, parse_last_line(output), errors


def predictions(workdir, path, user):
    images = workdir.parent / "data" / "images" / "*.png"
    run_here("predict", f"--workdir={workdir}", f"--images={images}", f"--output={path}", **user)
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_table_has_probability_and_decision_of_every_label(calibrated, tmp_path, user):
    workdir, *_ = calibrated
    lines = predictions(workdir, tmp_path / "lines.jsonl", user)
    images = workdir.parent / "data" / "images" / "*.png"
    run_here("predict", f"--workdir={workdir}", f"--images={images}", f"--output={tmp_path / 'table.csv'}", **user)
    with open(tmp_path / "table.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    decisions = [name for label in LABELS for name in (label, f"{label}_predicted")]
    assert list(rows[0]) == ["image", "label", "probability", *decisions, "error"]
    for row, line in zip(rows, lines, strict=True):
        for entry in line["predictions"]:
            assert float(row[entry["label"]]) == entry["probability"]
            assert row[f"{entry['label']}_predicted"] == str(entry["predicted"]).lower()
    assert {row["bright_predicted"] for row in rows} == {"true", "false"}


def logit(probability):
    return math.log(probability / (1 - probability))


def test_predictions_use_the_temperature_and_the_thresholds(calibrated, tmp_path, user):
    workdir, before, figures, errors = calibrated
    names = ["mode", "step", "examples", "temperature", "ece", "brier", "loss"]
    assert list(figures) == [*names, "ece_before", "brier_before", "loss_before", "path"]
    assert (figures["mode"], figures["examples"]) == ("calibrate", 10)
    assert figures["loss"] <= figures["loss_before"]
    assert f"ECE {figures['ece_before']:.4f} before, {figures['ece']:.4f} after" in errors
    file = json.loads((workdir / "calibration.json").read_text())
    assert (file["step"], file["class_names"], file["thresholds"][2]) == (figures["step"], list(LABELS), None)
    after = predictions(workdir, tmp_path / "after.jsonl", user)
    for old, new in zip(before, after, strict=True):
        plain = {entry["class_id"]: entry["probability"] for entry in old["predictions"]}
        for entry in new["predictions"]:
            label = entry["class_id"]
            assert logit(entry["probability"]) == pytest.approx(
                logit(plain[label]) / file["temperatures"][label], abs=1e-3
            )
            assert entry["predicted"] == (entry["probability"] >= (file["thresholds"][label] or 0.5))


def test_the_classifier_is_scaled_so_that_maps_and_exports_have_it(calibrated):
    workdir, _, figures, _ = calibrated
    predictor = Predictor.from_workdir(workdir)
    assert predictor.model.source.endswith(f"calibrated (temperature {figures['temperature']:.4g})")
    pixels = np.random.default_rng(0).integers(0, 256, (1, 8, 8, 1), np.uint8)
    explanation = predictor.explain([pixels[0]])[0]
    from_map = explanation.activation_map.mean() + explanation.bias
    assert from_map == pytest.approx(logit(predictor.probabilities(pixels)[0, explanation.class_id]), abs=1e-4)


def test_a_file_that_was_changed_or_is_of_another_checkpoint_is_one_line(calibrated, tmp_path, caplog):
    workdir, _, figures, _ = calibrated
    step, path = figures["step"], workdir / "calibration.json"
    assert read_calibration(str(workdir), step, 3) is not None
    assert read_calibration(str(tmp_path), step, 3) is None
    text = path.read_text()
    try:
        assert read_calibration(str(workdir), step + 1, 3) is None
        assert f"calibration.json is of step {step}, not {step + 1}, and is not used" in caplog.text
        with pytest.raises(UserError, match="it has 3 temperatures, the model 4 classes"):
            read_calibration(str(workdir), step, 4)
        for wrong in (text.replace('"specificity": 0.0', '"specificity": 0.5'), text[:99], "[]", "{}"):
            path.write_text(wrong)
            with pytest.raises(UserError, match=r"calibration.json can't be used \(.*\); run --mode calibrate again"):
                read_calibration(str(workdir), step, 3)
    finally:
        path.write_text(text)


def test_one_class_an_image_has_a_temperature(digits, user):
    workdir, _ = digits
    path = workdir / "calibration.json"
    pixels = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 1), np.uint8)
    plain = Predictor.from_workdir(workdir).probabilities(pixels)
    try:
        output, _ = run_here("calibrate", f"--workdir={workdir}", **user)
        scaled = Predictor.from_workdir(workdir).probabilities(pixels)
    finally:
        path.unlink(missing_ok=True)
    figures = parse_last_line(output)
    expected = jax.nn.softmax(np.log(plain) / figures["temperature"])
    np.testing.assert_allclose(scaled, expected, atol=1e-5)
    assert figures["loss"] < figures["loss_before"]
    _, errors = run_here("calibrate", f"--workdir={workdir}", "--specificity=0.9", expect=2, **user)
    assert "--specificity 0.9 is for many labels, but config.data.labels is 'single'; leave it out" in errors
