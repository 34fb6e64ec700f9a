"""Sections of a run's page about its predictions, of one class or many labels an image, and their calibration."""

from collections.abc import Sequence

import numpy as np

from densenet_jax.predict.calibration import Calibration
from densenet_jax.report import page
from densenet_jax.report.curves import NONE
from densenet_jax.report.gather import Answers, LabelMistake, Mistake
from densenet_jax.report.labels import LabelTable
from densenet_jax.report.look import Look
from densenet_jax.report.plots import confusion_chart, evidence_picture, make_picture, picture, reliability_chart
from densenet_jax.scores.bootstrap import class_intervals
from densenet_jax.scores.calibration import Reliability, sigmoid

Section = tuple[list[page.Picture], str]
_MOST_DRAWN = 30  # classes up to which the whole confusion matrix is drawn and tables of classes are open
_MOST_PAIRS = 20  # confused pairs listed


def look_sections(look: Look) -> list[Section]:
    """Returns the sections about what `look` has."""
    sections = []
    if look.answers is not None:
        sections += [_confusion(look, look.answers), _classes(look, look.answers)]
        sections.append(_class_reliability(look.answers.reliability))
        sections.append(_mistakes(look, look.answers.mistakes, "predicted class"))
    if look.label_table is not None and look.label_answers is not None:
        images = len(look.label_answers.logits)
        sections += [_labels(look, look.label_table, images), _label_reliability(look, look.label_table)]
        sections.append(_mistakes(look, look.label_answers.mistakes, "label"))
    if look.calibration is not None:
        sections.append(_calibration(look, look.calibration))
    if look.samples is not None:
        sections.append(_augmented(look))
    return sections


def _confusion(look: Look, answers: Answers) -> Section:
    names = look.class_names
    examples = answers.counted.shape[1]
    words = (
        f"Predictions of step {look.step:,} for {examples:,} evaluated images: {answers.right:,} right, "
        f"{examples - answers.right:,} wrong."
    )
    pictures, blocks = [], [page.text(words)]
    if len(names) <= _MOST_DRAWN:
        alt = "true classes downwards, predicted ones to the right"
        pictures.append(make_picture("confusion", alt, confusion_chart, answers.matrix(len(names)), names))
        blocks.append(page.charts([("True class (down) and predicted class (across)", pictures[0])]))
    totals = answers.scores(len(names)).examples
    rows = [
        (names[true], names[predicted], f"{count:,}", f"{count / totals[true]:.1%}")
        for true, predicted, count in answers.list_confused(_MOST_PAIRS)
    ]
    if rows:
        headings = ("true class", "predicted as", "images", "share of the class")
        blocks.append(page.table(headings, rows, numbers=(2, 3)))
    return pictures, page.section("Confusion", *blocks)


def _classes(look: Look, answers: Answers) -> Section:
    names, groups = look.class_names, None if look.groups is None else look.groups[answers.rows[0] >= 0]
    scores = answers.scores(len(names))
    present = scores.examples > 0
    accuracy = answers.right / max(1, answers.counted.shape[1])
    true, predicted = answers.counted
    intervals = class_intervals(true, predicted, len(names), groups=groups)
    low_high = {name: f" ({low:.2%} to {high:.2%})" for name, (low, high) in intervals.items()}
    words = (
        f"Accuracy {accuracy:.2%}{low_high['top1']}; means over the {np.count_nonzero(present):,} classes with images: "
        f"recall (balanced accuracy) {_mean(scores.recall[present])}{low_high['balanced_accuracy']}, "
        f"F1 {_mean(scores.f1[present])}{low_high['f1']}. In brackets, the intervals of 95% of 1,000 bootstrap draws. "
        "Precision is the share of a class's predictions that are right, recall the share of its images that are "
        "found. Worst class first; per_class.csv beside this page has the same figures."
    )
    # The worst first; classes without images, whose F1 says little, come last.
    order = sorted(range(len(names)), key=lambda number: (not present[number], np.nan_to_num(scores.f1[number])))
    rows = []
    for number in order:
        shares = (NONE if np.isnan(each[number]) else f"{each[number]:.1%}" for each in scores[2:])
        rows.append((names[number], f"{scores.examples[number]:,}", *shares))
    tables = _tables("All classes", ("class", "images", "precision", "recall", "F1"), rows)
    return [], page.section("Classes", page.text(words), *tables)


def _mean(values: np.ndarray) -> str:
    return f"{values.mean():.2%}" if len(values) else NONE


def _tables(title: str, headings: Sequence[str], rows: list[tuple[str, ...]], first: int = 0) -> list[str]:
    """Returns a table of names and numbers; of a long one the start, and all but the `first` rows folded away."""
    numbers = range(1, len(headings))
    start = page.table(headings, rows[: first + _MOST_DRAWN], numbers=numbers)
    if len(rows) <= first + _MOST_DRAWN:
        return [start]
    return [start, page.fold(title, page.table(headings, rows[first:], numbers=numbers))]


def _class_reliability(reliability: Reliability) -> Section:
    words = (
        f"Expected calibration error (ECE) {reliability.expected_calibration_error:.2%}, in {len(reliability.counts)} "
        "bins. Bars below the line: the model is surer than it should be; above: it is right more often than it says."
    )
    return _reliability("How often a prediction is right, by its confidence", words, reliability, many=False)


def _reliability(title: str, words: str, reliability: Reliability, *, many: bool) -> Section:
    drawn = _draw_reliability("reliability", reliability, many=many)
    return [drawn], page.section("Reliability", page.text(words), page.charts([(title, drawn)]))


def _mistakes(look: Look, mistakes: Sequence[Mistake | LabelMistake], explained: str) -> Section:
    """Shows the mistakes with the evidence for what is `explained`."""
    title, images = "Most confident mistakes", []
    for number, (mistake, name) in enumerate(zip(mistakes, look.names, strict=True), start=1):
        heading, sure = describe_mistake(mistake, look.class_names, look.calibration)
        png = evidence_picture(mistake.image, mistake.activation_map)
        images.append((page.Picture(f"mistake_{number:02d}", png, heading), heading, f"{sure} {name}"))
    if not images:
        return [], page.section(title, page.text("There are none."))
    words = f"Right: the evidence for the {explained} (its class activation map: the redder, the more)."
    blocks = (page.text(words, quiet=True), page.images(images, wide=True))
    return [image for image, _, _ in images], page.section(title, *blocks)


def describe_mistake(
    mistake: Mistake | LabelMistake, names: Sequence[str], calibration: Calibration | None
) -> tuple[str, str]:
    """Returns a heading for a mistake, and how sure the model was."""
    name = names[mistake.label]
    if isinstance(mistake, Mistake):
        sure = f"{mistake.confidence:.1%} sure; {mistake.label_probability:.1%} for the true class."
        return f"{name} predicted as {names[mistake.predicted]}", sure
    temperatures = calibration.temperatures if calibration is not None else (1.0,)
    chance = sigmoid(np.asarray(mistake.logit / temperatures[mistake.label % len(temperatures)]))
    return (f"{name} missed" if mistake.present else f"{name} though there is none"), f"{chance:.1%} for {name}."


def _labels(look: Look, table: LabelTable, images: int) -> Section:
    scored = int(np.count_nonzero(table.scores.is_scored))
    drawn = "whole groups" if table.grouped else "images"
    words = (
        f"Predictions of step {look.step:,} for {images:,} evaluated images. Means are over "
        f"the {scored:,} of {len(table.names):,} labels that have images with and without them; unknown labels count "
        f"nowhere. In brackets, the interval of 95% of {table.draws:,} bootstrap draws of {drawn}. F1, sensitivity and "
        "specificity are at the threshold. labels.csv beside this page has the same figures."
    )
    scores = ("AUROC", "average precision", "F1", "sensitivity", "specificity")
    headings = ("label", *scores, "threshold", "with it", "without", "unknown")
    tables = _tables("All labels", headings, table.page_rows(), first=1)  # the means
    return [], page.section("Labels", page.text(words), *tables)


def _label_reliability(look: Look, table: LabelTable) -> Section:
    words = (
        f"Expected calibration error (ECE) {table.trust.ece:.2%} and Brier score {table.trust.brier:.4f}, means over "
        f"labels{', after calibration' if look.calibration is not None else ''}. Bars below the line: the model is "
        "surer than it should be."
    )
    return _reliability("How often a label is there, by its probability", words, table.reliability, many=True)


def _calibration(look: Look, calibration: Calibration) -> Section:
    """Shows the figures and the reliability before and after the calibration."""
    content, stages = calibration.content, ("before", "after")
    rows = [
        (words, *(NONE if content[when][name] is None else f"{content[when][name]:.4f}" for when in stages))
        for words, name in (("ECE", "ece"), ("Brier score", "brier"), ("loss, nats", "loss"))
    ]
    words = f"Step {look.step:,} is {calibration.describe()} by {content['examples']:,} images of {content['split']}."
    drawn = [
        _draw_reliability(f"calibration_{when}", Reliability.from_dict(part), many=bool(calibration.thresholds))
        for when, part in zip(stages, content["reliability"], strict=True)
    ]
    return drawn, page.section(
        "Calibration",
        page.text(words),
        page.table(("", *stages), rows, numbers=(1, 2)),
        page.charts(zip(("Before", "After"), drawn, strict=True)),
    )


def _draw_reliability(name: str, reliability: Reliability, *, many: bool) -> page.Picture:
    alt = "share of images with the label at each probability" if many else "accuracy at each confidence"
    return make_picture(name, alt, reliability_chart, reliability, many_labels=many)


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
