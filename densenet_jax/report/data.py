"""Report page about a data set: samples, class balance, sizes and pipeline speed."""

import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from densenet_jax.data.summary import SplitSummary, measure_speed, summarize
from densenet_jax.experiment import Experiment, augmented_samples
from densenet_jax.experiment.samples import title_of
from densenet_jax.report import page
from densenet_jax.report.plots import balance_chart, make_picture, picture, together_chart
from densenet_jax.system.console import print_status, spinner
from densenet_jax.training.sharding import to_devices

_TIMED_STEPS = 4
_MOST_TOGETHER = 40  # labels up to which a chart shows which come together


def report_data(experiment: Experiment, workdir: str, data_name: str) -> dict[str, Any]:
    """Writes `workdir/report/data.html` and returns its path and the measured speeds in images a second.

    Raises:
        UserError: the data set is not prepared, or the directory can't be written to.
    """
    data = experiment.data
    with spinner("looking at the data"):
        splits = {"train": summarize(data.train_source), "evaluated": summarize(data.eval_source)}
        samples = augmented_samples(experiment)
        with data.eval_batches() as batches:
            evaluated = next(iter(batches))
    with spinner("measuring the pipeline"):
        pipeline = measure_speed(data.train_batches(0))
    with spinner("measuring the model"):
        model = model_speed(experiment)
    names = data.eval_source.class_names
    # With ten-crop evaluation, show the first crop.
    shown = [image if image.ndim == 3 else image[0] for image in evaluated["image"][:16]]
    titles = [title_of(label, names, experiment.many_labels) for label in evaluated["label"][:16]]
    enlarged = data.train_shape[0] < 64
    pictures = {
        "augmented": _grid("data_augmented", samples.images, samples.titles),
        "evaluated": _grid("data_evaluated", shown, titles),
    }
    counts = {name: summary.class_counts for name, summary in splits.items()}
    balance = make_picture("class_balance", "examples of each class, largest first", balance_chart, counts, names)
    labels, charts = _labels_section(splits, names)
    speeds = {
        "images a second from the input pipeline on this machine": f"{pipeline:,.0f}",
        f"images a second in training {experiment.variant.name} on this machine": f"{model:,.0f}",
    }
    content = page.document(
        f"{data_name} as the model sees it",
        page.tiles(speeds.items()),
        page.text(_verdict(pipeline, model)),
        page.section("Splits", _split_table(splits)),
        page.section("Class balance", page.charts([("Examples of each class, largest first", balance)])),
        *labels,
        page.section("Augmented training images", page.images(pictures["augmented"], enlarged=enlarged)),
        page.section("Evaluated images", page.images(pictures["evaluated"], enlarged=enlarged)),
    )
    every = [balance, *charts, *(entry[0] for entries in pictures.values() for entry in entries)]
    path = page.write_page(workdir, "data.html", content, every)
    print_status(f"data page: {path}")
    return {"path": path, "pipeline_images_per_sec": round(pipeline, 1), "model_images_per_sec": round(model, 1)}


def model_speed(experiment: Experiment) -> float:
    """Measures the training step alone, on one batch already on the devices, in images a second."""
    step = experiment.compile_train_step()
    with experiment.data.train_batches(0) as batches:
        batch = to_devices(next(iter(batches)), experiment.mesh)
    state, report = step(experiment.initial_state(), batch)
    jax.block_until_ready(report)
    began = time.perf_counter()
    for _ in range(_TIMED_STEPS):
        state, report = step(state, batch)
    jax.block_until_ready(report)
    return _TIMED_STEPS * experiment.timeline.global_batch_size / (time.perf_counter() - began)


def _verdict(pipeline: float, model: float) -> str:
    if pipeline >= model:
        return f"The pipeline is {pipeline / model:.1f} times as fast as the model: training does not wait for data."
    return f"The model is {model / pipeline:.1f} times as fast as the pipeline: training waits for data."


def _split_table(splits: dict[str, SplitSummary]) -> str:
    def span(values: np.ndarray) -> str:
        return f"{int(np.median(values))} ({values.min()} to {values.max()})" if len(values) else "unknown"

    rows = []
    for name, summary in splits.items():
        classes, groups = np.count_nonzero(summary.class_counts), f"{summary.groups:,}" if summary.groups else "none"
        spans = map(span, (summary.widths, summary.heights, summary.encoded_bytes))
        rows.append((name, f"{summary.examples:,}", str(classes), *spans, str(len(summary.damaged)), groups))
    headings = ("split", "images", "classes", "width, px", "height, px", "bytes", "damaged in sample", "groups")
    return page.table(headings, rows, numbers=range(1, 8))


def _labels_section(splits: dict[str, SplitSummary], names: Sequence[str]) -> tuple[list[str], list[page.Picture]]:
    """Shows many labels: how often each is present, absent and unknown, and which come together."""
    rows, charts = [], []
    for split, summary in splits.items():
        if summary.unknown is None or summary.together is None:
            return [], []
        for name, present, unknown in zip(names, summary.class_counts, summary.unknown, strict=True):
            counts = (present, summary.examples - present - unknown, unknown)
            share = f"{present / max(1, summary.examples - unknown):.1%}"
            rows.append((split, name, *(f"{count:,}" for count in counts), share))
        if len(names) <= _MOST_TOGETHER:
            alt = f"images of {split} that have both labels"
            charts.append(make_picture(f"labels_together_{split}", alt, together_chart, summary.together, names))
    headings = ("split", "label", "present", "absent", "unknown", "present of known")
    content = [page.table(headings, rows, numbers=range(2, 6))]
    if charts:
        content.append(page.charts([(chart.alt.capitalize(), chart) for chart in charts]))
    return [page.section("Labels", *content)], charts


def _grid(name: str, images: Any, titles: Any) -> list[tuple[page.Picture, str, str]]:
    return [
        (page.Picture(f"{name}_{index}", picture(image), title), title, "")
        for index, (image, title) in enumerate(zip(images, titles, strict=True))
    ]
