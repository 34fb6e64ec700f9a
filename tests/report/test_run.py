"""The page of a run: from made-up answers, and through the entry point."""

import csv
import html
import json
import os
import pathlib
import re
import runpy

import numpy as np
import pytest

from densenet_jax import modes
from densenet_jax.experiment import AugmentedSamples
from densenet_jax.experiment.samples import title_of
from densenet_jax.flags import Command
from densenet_jax.report.gather import Answers, Mistake
from densenet_jax.report.look import Look
from densenet_jax.report.run import run_page
from densenet_jax.scores.calibration import Reliability
from densenet_jax.training.timeline import Timeline
from tests.main_in_process import run_here
from tests.main_processes import parse_last_line
from tests.report.reading import Page, records, replace_charts

EVIL = "<script>x</script>"
SETTINGS = {"seed": 3, "model": {"name": "tiny"}, "data": {"name": EVIL}, "augment": {"mixup_alpha": 0.2}}
DEFAULTS = {**SETTINGS, "seed": 0}


def look(classes: int, side: int, channels: int, total_steps: int = 6) -> Look:
    image = np.zeros((side, side, channels), np.uint8)
    names = tuple(f"{EVIL} {number}" for number in range(classes))
    evidence = np.ones((2, 2), np.float32)
    mistakes = (Mistake(image, 7, 0, 1, 0.9, 0.05, evidence), Mistake(image, 3, 1, 0, 0.8, 0.2, evidence))
    rows = np.array([[0] * 4 + [1] * 4, [0, 0, 0, 1, 0, 0, 1, 1]])
    samples = AugmentedSamples(np.stack([image] * 3), (EVIL, "two", "three"))
    reliability = Reliability()
    reliability.add(np.array([0.9, 0.6]), np.array([True, False]))
    timeline = Timeline(2, 1, total_steps / 2, 1.0, 1000, 10)
    return Look(5, Answers(rows, mistakes, reliability), (EVIL, "file"), names, samples, timeline)


@pytest.mark.parametrize(("classes", "side", "channels", "drawn"), [(2, 8, 1, 2), (1000, 224, 3, 0)])
def test_page_holds_everything_and_escapes_it(classes, side, channels, drawn):
    command = Command("configs/digits.py", {"data.dir": "a b", "seed": 3}, DEFAULTS)
    pictures, content = run_page(f"runs/{EVIL}", SETTINGS, records(3), look(classes, side, channels), command)
    page = Page(content)
    assert "script" not in page.tags
    assert f"tiny on {EVIL}" in page.text
    assert "All 6 steps are done." in page.text
    assert "8 evaluated images: 5 right, 3 wrong" in page.text
    assert f"{EVIL} 1 {EVIL} 0 2 50.0%" in page.text
    assert f"{EVIL} 0 predicted as {EVIL} 1" in page.text
    assert "90.0% sure; 5.0% for the true class" in page.text
    assert "class activation map" in page.text
    assert "Expected calibration error (ECE) 35.00%" in page.text
    assert f"{EVIL} 0 4 60.0% 75.0% 66.7%" in page.text
    limits = r" \(\d+\.\d\d% to \d+\.\d\d%\)"
    assert re.search(rf"recall \(balanced accuracy\) 62\.50%{limits}, F1 61\.90%{limits}", page.text)
    assert "config.seed 3 0" in page.text
    assert "jax " in page.text
    assert "1 × cpu" in page.text or "8 × cpu" in page.text
    assert len(page.pictures) == 10 + drawn + 2 + 2 + 3
    assert ("confusion" in {picture.name for picture in pictures}) == bool(drawn)
    assert len(page.pictures) == sum(len(picture.files()) for picture in pictures)


def test_commands_fit_the_state(monkeypatch):
    replace_charts(monkeypatch)

    def commands(total_steps, recorded, **train):
        command = Command("configs/digits.py", {"data.dir": "a b", "seed": 3}, DEFAULTS)
        _, content = run_page("runs/x y", {"train": train}, recorded, look(2, 8, 1, total_steps=total_steps), command)
        return re.findall(r"(python main.py [^<]*?|densenet-jax [^<]*?)</code>", html.unescape(content))

    place = "--workdir 'runs/x y'"
    assert [line.partition("--mode ")[2] for line in commands(6, records(3))] == [
        f"eval {place} --checkpoint best",
        f"predict {place} --checkpoint best --images PATH --output predictions.csv",
        f"export {place} --checkpoint best --format onnx",
        f"serve {place} --checkpoint best",
        f"report {place}",
    ]
    assert "best" not in " ".join(commands(6, records(3, validated=False)))
    stalled = [{**record, "top1": 0.5} for record in records(3)]
    assert commands(20, stalled, patience_epochs=2.0) == commands(6, stalled)
    assert commands(20, stalled, patience_epochs=3.0) == commands(20, records(3))
    assert commands(7, records(3)) == [
        f"python main.py --config configs/digits.py {place} '--config.data.dir=a b' --config.seed=3",
        f"python main.py --mode eval {place}",
        f"python main.py --mode report {place}",
    ]


@pytest.mark.parametrize(
    ("label", "title"),
    [
        (np.int32(1), "two"),
        (np.float32([0, 0, 1]), "three"),
        (np.float32([0.7, 0, 0.3]), "70% one + 30% three"),
        (np.float32([0.001, 0.999, 0]), "two"),
    ],
)
def test_mixed_images_are_named_by_their_shares(label, title):
    assert title_of(label, ("one", "two", "three"), many_labels=False) == title


def test_run_that_has_nothing_yet_has_a_page():
    bare = Look(missing=("No predictions: none & so on",))
    pictures, content = run_page("runs/x", {}, [], bare, Command())
    assert pictures == []
    text = Page(content).text
    assert "0 steps done" in text
    assert "No predictions: none & so on" in text
    assert "No metrics have been written yet." in text


QUICK = (
    "--config=configs/digits.py",
    "--config.model.block_sizes=(1,)",
    "--config.train.epochs=0.3",
    "--config.optim.warmup_epochs=0.1",
    "--config.train.log_every_steps=3",
    "--config.eval.checkpoint=latest",
)


@pytest.fixture(scope="module")
def finished(user, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("report") / "run"
    _, errors = run_here(*QUICK, f"--workdir={workdir}", **user)
    assert "warning" not in errors
    assert f"report: {workdir}/report/index.html" in errors
    return workdir


def test_training_ends_with_a_page_that_agrees_with_its_validation(finished):
    page = Page((finished / "report" / "index.html").read_text())
    assert "All 7 steps are done." in page.text
    reports = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    right = round(reports[-1]["top1"] * 360)
    assert f"Predictions of step 7 for 360 evaluated images: {right} right, {360 - right} wrong." in page.text
    assert "config.train.epochs 0.3 300.0" in page.text
    assert f"--mode serve --workdir {finished} --checkpoint best" in page.text
    with open(finished / "report" / "per_class.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == [str(digit) for digit in range(10)]
    assert sum(int(row["correct"]) for row in rows) == right
    for name in ("reliability.png", "loss.png", "top1_dark.png", "confusion.png", "mistake_12.png", "augmented_16.png"):
        assert (finished / "report" / name).is_file()
    assert len(page.pictures) == len(list((finished / "report").glob("*.png")))


def test_event_file_begins_with_the_settings_and_the_augmented_images(finished):
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    (path,) = finished.glob("events.out.tfevents.*")
    tags = {value.tag: event for event in EventFileLoader(str(path)).Load() for value in event.summary.value}
    assert tags["settings"].step == tags["augmented/16"].step == 0
    assert b"    train.epochs = 0.3" in tags["settings"].summary.value[0].tensor.string_val[0]
    assert "augmented/17" not in tags


def test_report_mode_changes_nothing_else_and_works_on_a_run_that_stopped(finished, user, monkeypatch):
    replace_charts(monkeypatch)

    def files():
        return {
            path: (path.stat().st_mtime_ns, path.read_bytes())
            for path in finished.rglob("*")
            if path.is_file() and path.parent.name != "report"
        }

    before = files()
    (finished / "report" / "index.html").unlink()
    output, _ = run_here(*QUICK, "--mode=report", f"--workdir={finished}", **user)
    assert parse_last_line(output) == {"mode": "report", "path": f"{finished}/report/index.html"}
    assert files() == before

    stopped = finished.parent / "stopped"
    stopped.mkdir()
    (stopped / "config.json").write_bytes((finished / "config.json").read_bytes())
    line = (finished / "metrics.jsonl").read_bytes().splitlines(keepends=True)[0]
    (stopped / "metrics.jsonl").write_bytes(line + b'{"step": 5, "cut sh')
    _, errors = run_here(*QUICK, "--mode=report", f"--workdir={stopped}", **user)
    assert "warning: No predictions: " in errors
    text = Page((stopped / "report" / "index.html").read_text()).text
    assert "3 of 7 steps are done" in text
    assert "No predictions: " in text
    assert sorted(os.listdir(stopped)) == ["config.json", "metrics.jsonl", "report"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--mode=report"], "is not a run's directory"),
        (["--mode=eval", "--compare=a"], "--compare a is for --mode report"),
    ],
)
def test_a_mistake_is_one_clear_line(arguments, said, user, tmp_path):
    _, errors = run_here(*QUICK, f"--workdir={tmp_path / 'x'}", *arguments, expect=2, **user)
    assert errors.startswith("error: ")
    assert len(errors.splitlines()) == 1
    assert said in errors
    assert not (tmp_path / "x").exists()


def test_training_does_not_fail_with_its_report(monkeypatch, caplog):
    def fail(*_):
        raise RuntimeError("no room\nat all")

    monkeypatch.setattr("densenet_jax.experiment.Experiment", lambda config: config)
    monkeypatch.setattr("densenet_jax.run.train.train", lambda *_: {"step": 7})
    monkeypatch.setattr("densenet_jax.report.run.report_run", fail)
    assert modes.train_mode({}, "x", Command()) == {"step": 7}
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("WARNING", "the report could not be written (RuntimeError: no room at all); --mode report tries again.")
    ]


def test_picture_for_the_readme_is_small(tmp_path):
    draw = runpy.run_path(str(pathlib.Path(__file__).parents[2] / "docs/site/curves.py"))["draw_curves"]
    lines = [json.dumps(record) + "\n" for record in records(40)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    draw(str(tmp_path), str(tmp_path / "digits.png"))
    assert 10_000 < (tmp_path / "digits.png").stat().st_size < 80_000
