"""Report page about one run."""

import shlex
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from densenet_jax.config.run_settings import read_settings
from densenet_jax.experiment import Experiment
from densenet_jax.flags import Command, program_words
from densenet_jax.report import page
from densenet_jax.report.curves import NONE, Record, curve, final_figures, run_charts
from densenet_jax.report.look import Look, look_at
from densenet_jax.report.machine import hardware, versions
from densenet_jax.report.per_class import per_class_rows, to_csv
from densenet_jax.report.plots import (
    DARK,
    LIGHT,
    confusion_chart,
    evidence_picture,
    picture,
    readme_curves,
    reliability_chart,
)
from densenet_jax.report.settings import changed_settings, every_setting
from densenet_jax.report.trust import calibration_section, label_sections
from densenet_jax.report.write import write_page
from densenet_jax.run.metrics_file import read_metrics
from densenet_jax.system.console import print_status, spinner
from densenet_jax.training.best_metric import score_figures

_MOST_DRAWN = 30  # classes up to which the whole confusion matrix is drawn and the class table is open
_MOST_PAIRS = 20  # confused pairs listed
Section = tuple[list[page.Picture], str]


def report_run(experiment: Experiment, workdir: str, command: Command) -> str:
    """Writes `workdir/report/index.html` with pictures and per_class.csv or labels.csv, and returns the page's path.

    Without a checkpoint or the data set, their sections are left out and the page says why. All processes must call
    this; process 0 writes.

    Raises:
        UserError: `workdir` is not a run's directory, or can't be written to.
    """
    settings, records = read_settings(workdir), read_metrics(workdir)
    look = look_at(experiment, workdir)
    path = ""
    if jax.process_index() == 0:
        with spinner("drawing the report"):
            pictures, content = run_page(workdir, settings, records, look, command)
            tables = {}
            if look.answers is not None:
                rows = per_class_rows(look.scores(), look.class_names, range(len(look.class_names)))
                tables["per_class.csv"] = to_csv(rows)
            if look.label_table is not None:
                tables["labels.csv"] = to_csv(look.label_table.csv_rows())
            path = write_page(workdir, "index.html", content, pictures, tables)
        print_status(f"report: {path}")
    return path


def run_page(
    workdir: str, settings: dict[str, Any], records: Sequence[Record], look: Look, command: Command
) -> tuple[list[page.Picture], str]:
    """Builds the page about a run and returns its pictures and content."""
    augment = settings.get("augment", {})
    charts = [
        chart.render()
        for chart in run_charts(records, mixed=bool(augment.get("mixup_alpha") or augment.get("cutmix_alpha")))
    ]
    pictures = [shown for _, shown in charts]
    blocks = [
        page.text(f"Work directory {workdir}. {_how_far(records, settings, look)}", quiet=True),
        *(page.text(why) for why in look.missing),
        page.tiles((what, value) for what, value in final_figures(records, _best_metric(settings)) if value != NONE),
        page.section("Curves", page.charts(charts) if charts else page.text("No metrics have been written yet.")),
    ]
    sections = []
    if look.answers is not None:
        sections += [_confusion(look), _classes(look), _reliability(look), _mistakes(look)]
    if look.label_table is not None:
        sections += label_sections(look)
    if look.calibration is not None:
        sections.append(calibration_section(look))
    if look.samples is not None:
        sections.append(_augmented(look))
    for drawn, block in sections:
        pictures += drawn
        blocks.append(block)
    blocks += [
        _settings(settings, command),
        page.section(
            "Versions and hardware",
            page.text("From the process that wrote this page.", quiet=True),
            page.table(("what", "which"), [*versions(), *hardware()]),
        ),
        _commands(workdir, command, records, is_finished=_is_finished(records, settings, look)),
    ]
    model, data = settings.get("model", {}).get("name", "?"), settings.get("data", {}).get("name", "?")
    return pictures, page.document(f"{model} on {data}", *blocks)


def _how_far(records: Sequence[Record], settings: dict[str, Any], look: Look) -> str:
    step = _last_step(records)
    if look.timeline is None:
        return f"{step:,} steps done."
    if step >= look.timeline.total_steps:
        return f"All {step:,} steps are done."
    is_early = _is_finished(records, settings, look)
    why = "it stopped early, as validation no longer improved" if is_early else "the run is under way or was stopped"
    return f"{step:,} of {look.timeline.total_steps:,} steps are done: {why}."


def _is_finished(records: Sequence[Record], settings: dict[str, Any], look: Look) -> bool:
    """Returns whether training has reached its end or stopped early; False where the length is unknown."""
    if look.timeline is None:
        return False
    scores = {
        record["step"]: score_figures(record, _best_metric(settings))
        for record in records
        if record["split"] == "validation"
    }
    patience = settings.get("train", {}).get("patience_epochs", 0)
    is_early = look.timeline.stalled_since(scores, patience) is not None
    return is_early or _last_step(records) >= look.timeline.total_steps


def _best_metric(settings: dict[str, Any]) -> str:
    return settings.get("checkpoint", {}).get("best_metric", "")


def _last_step(records: Sequence[Record]) -> int:
    return max((record["step"] for record in records), default=0)


def _confusion(look: Look) -> Section:
    answers, names = look.answers, look.class_names
    assert answers is not None
    pictures, blocks = [], []
    blocks.append(
        page.text(
            f"Predictions of step {look.step:,} for {answers.examples:,} evaluated images: {answers.right:,} right, "
            f"{answers.examples - answers.right:,} wrong."
        )
    )
    if len(names) <= _MOST_DRAWN:
        matrix = answers.matrix(len(names))
        light, dark = (confusion_chart(matrix, names, theme=theme) for theme in (LIGHT, DARK))
        drawn = page.Picture("confusion", light, "true classes downwards, predicted ones to the right", dark)
        pictures.append(drawn)
        blocks.append(page.charts([("True class (down) and predicted class (across)", drawn)]))
    rows = [
        (names[true], names[predicted], f"{count:,}", f"{count / answers.class_total(true):.1%}")
        for true, predicted, count in answers.list_confused(_MOST_PAIRS)
    ]
    if rows:
        headings = ("true class", "predicted as", "images", "share of the class")
        blocks.append(page.table(headings, rows, numbers=(2, 3)))
    return pictures, page.section("Confusion", *blocks)


def _classes(look: Look) -> Section:
    scores, names = look.scores(), look.class_names
    assert look.answers is not None
    present = scores.examples > 0
    accuracy = look.answers.right / max(1, look.answers.examples)
    low_high = {name: f" ({low:.2%} to {high:.2%})" for name, (low, high) in look.intervals().items()}
    words = (
        f"Accuracy {accuracy:.2%}{low_high['top1']}; means over the {np.count_nonzero(present):,} classes with images: "
        f"recall (balanced accuracy) {_mean(scores.recall[present])}{low_high['balanced_accuracy']}, "
        f"F1 {_mean(scores.f1[present])}{low_high['f1']}. In brackets, the intervals of 95% of 1,000 bootstrap draws. "
        "Precision is the share of a class's predictions that are right, recall the share of its images that are "
        "found. Worst class first; per_class.csv beside this page has the same figures."
    )
    # The worst first; classes without images, whose F1 says little, come last.
    order = sorted(range(len(names)), key=lambda number: (not present[number], np.nan_to_num(scores.f1[number])))
    rows = [
        (
            names[number],
            f"{scores.examples[number]:,}",
            *(NONE if np.isnan(each[number]) else f"{each[number]:.1%}" for each in scores[2:]),
        )
        for number in order
    ]
    headings, numbers = ("class", "images", "precision", "recall", "F1"), range(1, 5)
    blocks = [page.text(words), page.table(headings, rows[:_MOST_DRAWN], numbers=numbers)]
    if len(rows) > _MOST_DRAWN:
        blocks.append(page.fold("All classes", page.table(headings, rows, numbers=numbers)))
    return [], page.section("Classes", *blocks)


def _mean(values: np.ndarray) -> str:
    return f"{values.mean():.2%}" if len(values) else NONE


def _reliability(look: Look) -> Section:
    assert look.answers is not None
    reliability = look.answers.reliability
    light, dark = (reliability_chart(reliability, theme=theme) for theme in (LIGHT, DARK))
    drawn = page.Picture("reliability", light, "accuracy of the predictions at each confidence", dark)
    words = (
        f"Expected calibration error (ECE) {reliability.expected_calibration_error:.2%}, in {len(reliability.counts)} "
        "bins. Bars below the line: the model is surer than it should be; above: it is right more often than it says."
    )
    title = "How often a prediction is right, by its confidence"
    return [drawn], page.section("Reliability", page.text(words), page.charts([(title, drawn)]))


def _mistakes(look: Look) -> Section:
    assert look.answers is not None
    entries, names, mistakes = [], look.class_names, look.answers.mistakes
    explained = any(mistake.activation_map is not None for mistake in mistakes)
    for number, (mistake, name) in enumerate(zip(mistakes, look.names, strict=True), start=1):
        heading = f"{names[mistake.label]} predicted as {names[mistake.predicted]}"
        evidence = mistake.activation_map
        png = picture(mistake.image) if evidence is None else evidence_picture(mistake.image, evidence)
        shown = page.Picture(f"mistake_{number:02d}", png, heading)
        more = f"{mistake.confidence:.1%} sure; {mistake.label_probability:.1%} for the true class. {name}"
        entries.append((shown, heading, more))
    if not entries:
        return [], page.section("Most confident mistakes", page.text("There are none."))
    enlarged = mistakes[0].image.shape[1] < 100
    words = "Right: the evidence for the predicted class (its class activation map: the redder, the more)."
    blocks = [page.text(words, quiet=True)] if explained else []
    blocks.append(page.images(entries, enlarged=enlarged and not explained, wide=explained))
    return [entry[0] for entry in entries], page.section("Most confident mistakes", *blocks)


def _augmented(look: Look) -> Section:
    assert look.samples is not None
    entries = [
        (page.Picture(f"augmented_{number:02d}", picture(image), f"augmented image of {title}"), title, "")
        for number, (image, title) in enumerate(zip(look.samples.images, look.samples.titles, strict=True), start=1)
    ]
    return [entry[0] for entry in entries], page.section(
        "Augmented training images",
        page.text("The first images of step 0 as the model sees them.", quiet=True),
        page.images(entries, enlarged=look.samples.images.shape[2] < 100),
    )


def _settings(settings: dict[str, Any], command: Command) -> str:
    changed = changed_settings(command.defaults, settings)
    return page.section(
        "Settings",
        page.text("Differences from configs/default.py:" if changed else "All as in configs/default.py."),
        *([page.table(("setting", "this run", "default"), changed)] if changed else []),
        page.fold("All settings", page.table(("setting", "value"), every_setting(settings))),
    )


def _commands(workdir: str, command: Command, records: Sequence[Record], *, is_finished: bool) -> str:
    """Lists the commands that make sense now: those for a finished model only once it is finished."""

    def line(mode: str, *words: str) -> str:
        return shlex.join([*program_words(), "--mode", mode, "--workdir", workdir, *words])

    best = ("--checkpoint", "best") if any(record["split"] == "validation" for record in records) else ()
    again = ("Write this page again:", line("report"))
    if is_finished:
        which = "best" if best else "last"
        entries = [
            (f"Evaluate the {which} checkpoint:", line("eval", *best)),
            ("Predict images:", line("predict", *best, "--images", "PATH", "--output", "predictions.csv")),
            ("Export the model, to ONNX for example:", line("export", *best, "--format", "onnx")),
            ("Serve it over REST and gRPC:", line("serve", *best)),
            again,
        ]
    else:
        entries = [
            ("Continue this run to its end:", command.line(workdir)),
            ("Evaluate its newest checkpoint:", line("eval")),
            again,
        ]
    return page.section("Commands", *(page.command(what, words) for what, words in entries))


def write_readme_curves(workdir: str, path: str) -> None:
    """Draws accuracy and loss of a run into the PNG file `path`; see `plots.readme_curves`."""
    records = read_metrics(workdir)
    accuracy, loss = (
        [curve(records, split, key, style) for style, split in enumerate(("train", "validation"))]
        for key in ("top1", "loss")
    )
    with open(path, "wb") as file:
        file.write(readme_curves(accuracy, loss))
