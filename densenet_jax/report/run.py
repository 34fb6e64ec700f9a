"""From a run to its page."""

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

import jax

from densenet_jax.errors import UserError
from densenet_jax.experiment import AugmentedSamples, Experiment, augmented_samples
from densenet_jax.flags import Command
from densenet_jax.report import page
from densenet_jax.report.curves import NONE, Record, curve, final_figures, run_charts
from densenet_jax.report.gather import Answers, gather_answers
from densenet_jax.report.machine import hardware, versions
from densenet_jax.report.plots import DARK, LIGHT, confusion_chart, picture, readme_curves
from densenet_jax.report.settings import changed_settings, every_setting
from densenet_jax.report.write import write_page
from densenet_jax.run.metric_writers import read_metrics
from densenet_jax.system.console import print_status, spinner
from densenet_jax.workdir import read_settings

logger = logging.getLogger(__name__)
_MOST_DRAWN = 30  # classes up to which the whole confusion matrix is drawn
_MOST_PAIRS = 20  # confused pairs named


@dataclasses.dataclass(frozen=True)
class Look:
    """What was seen with the model and the data; None for what could not be had, which `missing` explains.

    Attributes:
        step: of the checkpoint whose answers these are.
        answers: to the evaluated split.
        names: of the examples with the mistakes, in their order.
        class_names: one a class.
        samples: augmented training images.
        total_steps: how long the whole run is.
        missing: why something is None, in sentences.
    """

    step: int | None = None
    answers: Answers | None = None
    names: tuple[str, ...] = ()
    class_names: tuple[str, ...] = ()
    samples: AugmentedSamples | None = None
    total_steps: int | None = None
    missing: tuple[str, ...] = ()


def report_run(experiment: Experiment, workdir: str, command: Command) -> str:
    """Writes `workdir/report/index.html` with its pictures and returns its path.

    What can't be had (no checkpoint yet, the data elsewhere) is left out, with the reason on the page. All processes
    call this; the first one writes.

    Raises:
        UserError: `workdir` is not a run's directory, or can't be written to.
    """
    settings, records = read_settings(workdir), read_metrics(workdir)
    look = look_at(experiment, workdir)
    path = ""
    if jax.process_index() == 0:
        with spinner("drawing the report"):
            pictures, content = run_page(workdir, settings, records, look, command)
            path = write_page(workdir, "index.html", content, pictures)
        print_status(f"report: {path}")
    return path


def look_at(experiment: Experiment, workdir: str) -> Look:
    """Asks the saved model about the evaluated split and augments some training images."""
    look, missing = Look(), []
    try:
        look = dataclasses.replace(
            look, samples=augmented_samples(experiment), total_steps=experiment.timeline.total_steps
        )
    except UserError as error:
        missing.append(f"No augmented training images: {error}")
    try:
        step, variables = experiment.saved_variables(workdir)
        data = experiment.data
        with data.eval_batches() as batches:
            answers = gather_answers(
                experiment.compile_predict_step(),
                variables,
                batches,
                experiment.mesh,
                batch_count=data.eval_batch_count,
            )
        names = tuple(data.eval_source[mistake.index].name for mistake in answers.mistakes)
        look = dataclasses.replace(
            look, step=step, answers=answers, names=names, class_names=tuple(data.eval_source.class_names)
        )
    except UserError as error:
        missing.append(f"No predictions: {error}")
    for why in missing:
        logger.warning("%s", why)
    return dataclasses.replace(look, missing=tuple(missing))


def run_page(
    workdir: str, settings: dict[str, Any], records: Sequence[Record], look: Look, command: Command
) -> tuple[list[page.Picture], str]:
    """The page about one run and the pictures on it."""
    augment = settings.get("augment", {})
    charts = [
        chart.render()
        for chart in run_charts(records, mixed=bool(augment.get("mixup_alpha") or augment.get("cutmix_alpha")))
    ]
    pictures = [shown for _, shown in charts]
    blocks = [
        page.text(f"Work directory {workdir}. {_how_far(records, look)}", quiet=True),
        *(page.text(why) for why in look.missing),
        page.tiles((what, value) for what, value in final_figures(records) if value != NONE),
        page.section("Curves", page.charts(charts) if charts else page.text("No metrics have been written yet.")),
    ]
    for part in (_confusion(look), _mistakes(look), _augmented(look)):
        if part is not None:
            pictures += part[0]
            blocks.append(part[1])
    blocks += [
        _settings(settings, command),
        page.section(
            "Versions and hardware",
            page.text("Of the process that wrote this page.", quiet=True),
            page.table(("what", "which"), [*versions(), *hardware()]),
        ),
        _commands(workdir, command),
    ]
    model, data = settings.get("model", {}).get("name", "?"), settings.get("data", {}).get("name", "?")
    return pictures, page.document(f"{model} on {data}", *blocks)


def _how_far(records: Sequence[Record], look: Look) -> str:
    step = max((record["step"] for record in records), default=0)
    if look.total_steps is None:
        return f"{step:,} steps done."
    if step >= look.total_steps:
        return f"All {step:,} steps are done."
    return f"{step:,} of {look.total_steps:,} steps are reported: the run is under way or was stopped."


def _confusion(look: Look) -> tuple[list[page.Picture], str] | None:
    answers, names = look.answers, look.class_names
    if answers is None:
        return None
    pictures, blocks = [], []
    wrong = answers.examples - answers.right
    blocks.append(
        page.text(
            f"Answers of step {look.step:,} to {answers.examples:,} evaluated images: {answers.right:,} right, "
            f"{wrong:,} wrong."
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
        for true, predicted, count in answers.confused(_MOST_PAIRS)
    ]
    if rows:
        headings = ("true class", "taken for", "images", "share of the class")
        blocks.append(page.table(headings, rows, numbers=(2, 3)))
    return pictures, page.section("Confusion", *blocks)


def _mistakes(look: Look) -> tuple[list[page.Picture], str] | None:
    if look.answers is None or not look.answers.mistakes:
        return None
    entries, names = [], look.class_names
    for number, (mistake, name) in enumerate(zip(look.answers.mistakes, look.names, strict=True), start=1):
        alt = f"a {names[mistake.label]} taken for {names[mistake.predicted]}"
        shown = page.Picture(f"mistake_{number:02d}", picture(mistake.image), alt)
        heading = f"{names[mistake.label]} taken for {names[mistake.predicted]}"
        more = f"{mistake.confidence:.1%} sure; {mistake.label_probability:.1%} for the label. {name}"
        entries.append((shown, heading, more))
    enlarged = look.answers.mistakes[0].image.shape[1] < 100
    return [entry[0] for entry in entries], page.section(
        "Most confident mistakes", page.images(entries, enlarged=enlarged)
    )


def _augmented(look: Look) -> tuple[list[page.Picture], str] | None:
    if look.samples is None:
        return None
    entries = [
        (page.Picture(f"augmented_{number:02d}", picture(image), f"augmented image of {title}"), title, "")
        for number, (image, title) in enumerate(zip(look.samples.images, look.samples.titles, strict=True), start=1)
    ]
    return [entry[0] for entry in entries], page.section(
        "Augmented training images",
        page.text("The first images of step 0 as the model is given them.", quiet=True),
        page.images(entries, enlarged=look.samples.images.shape[2] < 100),
    )


def _settings(settings: dict[str, Any], command: Command) -> str:
    changed = changed_settings(command.defaults, settings)
    return page.section(
        "Settings",
        page.text("What differs from configs/default.py:" if changed else "All as in configs/default.py."),
        *([page.table(("setting", "this run", "default"), changed)] if changed else []),
        page.folded("All settings", page.table(("setting", "value"), every_setting(settings))),
    )


def _commands(workdir: str, command: Command) -> str:
    return page.section(
        "Commands",
        page.command("Continue this run to its end:", command.line(workdir)),
        page.command("Evaluate its newest checkpoint:", command.line(workdir, "eval")),
        page.command("Evaluate its best checkpoint:", command.line(workdir, "eval", eval__checkpoint="best")),
        page.command("Write this page again:", command.line(workdir, "report")),
    )


def write_readme_curves(workdir: str, path: str) -> None:
    """Draws accuracy and loss of the run in `workdir` into the PNG file `path`; see `plots.readme_curves`."""
    records = read_metrics(workdir)
    accuracy, loss = (
        [curve(records, split, key, style) for style, split in enumerate(("train", "validation"))]
        for key in ("top1", "loss")
    )
    with open(path, "wb") as file:
        file.write(readme_curves(accuracy, loss))
