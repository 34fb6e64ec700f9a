"""Sections of a run's page about many labels, and about what was calibrated."""

import numpy as np

from densenet_jax.report import page
from densenet_jax.report.curves import NONE
from densenet_jax.report.labels import describe_mistake
from densenet_jax.report.look import Look
from densenet_jax.report.plots import DARK, LIGHT, evidence_picture, reliability_chart
from densenet_jax.scores.calibration import Reliability

Section = tuple[list[page.Picture], str]
_MOST_SHOWN = 30  # labels up to which the whole table is open


def label_sections(look: Look) -> list[Section]:
    """Returns the sections about the predictions of many labels."""
    return [_labels(look), _reliability(look), _mistakes(look)]


def _labels(look: Look) -> Section:
    table = look.label_table
    assert table is not None
    assert look.label_answers is not None
    scored = int(np.count_nonzero(table.scores.is_scored))
    drawn = "whole groups" if table.grouped else "images"
    words = (
        f"Predictions of step {look.step:,} for {len(look.label_answers.logits):,} evaluated images. Means are over "
        f"the {scored:,} of {len(table.names):,} labels that have images with and without them; unknown labels count "
        f"nowhere. In brackets, the interval of 95% of {table.draws:,} bootstrap draws of {drawn}. F1, sensitivity and "
        "specificity are at the threshold. labels.csv beside this page has the same figures."
    )
    scores = ("AUROC", "average precision", "F1", "sensitivity", "specificity")
    headings = ("label", *scores, "threshold", "with it", "without", "unknown")
    *rows, means = table.page_rows(NONE)
    numbers = range(1, len(headings))
    blocks = [page.text(words), page.table(headings, [means, *rows[:_MOST_SHOWN]], numbers=numbers)]
    if len(rows) > _MOST_SHOWN:
        blocks.append(page.fold("All labels", page.table(headings, rows, numbers=numbers)))
    return [], page.section("Labels", *blocks)


def _reliability(look: Look) -> Section:
    assert look.label_table is not None
    trust = look.label_table.trust
    drawn = _picture("reliability", look.label_table.reliability, many=True)
    words = (
        f"Expected calibration error (ECE) {trust.ece:.2%} and Brier score {trust.brier:.4f}, means over labels"
        f"{', after calibration' if look.calibration is not None else ''}. Bars below the line: the model is surer "
        "than it should be."
    )
    title = "How often a label is there, by its probability"
    return [drawn], page.section("Reliability", page.text(words), page.charts([(title, drawn)]))


def _mistakes(look: Look) -> Section:
    assert look.label_answers is not None
    entries = []
    for number, (mistake, name) in enumerate(zip(look.label_answers.mistakes, look.names, strict=True), start=1):
        heading, sure = describe_mistake(mistake, look.class_names, look.calibration)
        png = evidence_picture(mistake.image, mistake.activation_map)
        entries.append((page.Picture(f"mistake_{number:02d}", png, heading), heading, f"{sure} {name}"))
    if not entries:
        return [], page.section("Most confident mistakes", page.text("There are none."))
    words = "Right: the evidence for the label (its class activation map: the redder, the more)."
    blocks = (page.text(words, quiet=True), page.images(entries, wide=True))
    return [entry[0] for entry in entries], page.section("Most confident mistakes", *blocks)


def calibration_section(look: Look) -> Section:
    """Returns the section about the calibration: figures and reliability before and after."""
    assert look.calibration is not None
    content = look.calibration.content
    rows = [
        (
            words,
            *(NONE if content[when][name] is None else f"{content[when][name]:.4f}" for when in ("before", "after")),
        )
        for words, name in (("ECE", "ece"), ("Brier score", "brier"), ("loss, nats", "loss"))
    ]
    words = (
        f"Step {look.step:,} is {look.calibration.describe()} by {content['examples']:,} images of {content['split']}."
    )
    many = bool(look.calibration.thresholds)
    parts = [Reliability.from_dict(part) for part in content["reliability"]]
    drawn = [
        _picture(f"calibration_{when}", part, many=many) for when, part in zip(("before", "after"), parts, strict=True)
    ]
    return drawn, page.section(
        "Calibration",
        page.text(words),
        page.table(("", "before", "after"), rows, numbers=(1, 2)),
        page.charts(zip(("Before", "After"), drawn, strict=True)),
    )


def _picture(name: str, reliability: Reliability, *, many: bool) -> page.Picture:
    light, dark = (reliability_chart(reliability, theme=theme, many_labels=many) for theme in (LIGHT, DARK))
    what = "share of images with the label at each probability" if many else "accuracy at each confidence"
    return page.Picture(name, light, what, dark)
