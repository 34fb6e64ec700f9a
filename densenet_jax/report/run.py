"""Report page about one run."""

import collections
import importlib.metadata
import os
import platform
import shlex
from collections.abc import Sequence
from typing import Any

import jax

from densenet_jax.config.run_settings import read_settings
from densenet_jax.experiment import Experiment
from densenet_jax.flags import Command, program_words
from densenet_jax.report import page
from densenet_jax.report.curves import NONE, Record, final_figures, run_charts
from densenet_jax.report.look import Look, look_at
from densenet_jax.report.per_class import per_class_rows, to_csv
from densenet_jax.report.sections import look_sections
from densenet_jax.report.settings import changed_settings, every_setting
from densenet_jax.run.metrics_file import read_metrics
from densenet_jax.system.console import print_status, spinner
from densenet_jax.training.best_metric import score_figures
from densenet_jax.version import __version__

_LIBRARIES = (
    *("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets"),
    *("numpy", "matplotlib"),
)


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
                scores, classes = look.answers.scores(len(look.class_names)), range(len(look.class_names))
                tables["per_class.csv"] = to_csv(per_class_rows(scores, look.class_names, classes))
            if look.label_table is not None:
                tables["labels.csv"] = to_csv(look.label_table.csv_rows())
            path = page.write_page(workdir, "index.html", content, pictures, tables)
        print_status(f"report: {path}")
    return path


def run_page(
    workdir: str, settings: dict[str, Any], records: Sequence[Record], look: Look, command: Command
) -> tuple[list[page.Picture], str]:
    """Builds the page about a run and returns its pictures and content."""
    augment = settings.get("augment", {})
    mixed = bool(augment.get("mixup_alpha") or augment.get("cutmix_alpha"))
    charts = [chart.render() for chart in run_charts(records, mixed=mixed)]
    pictures = [shown for _, shown in charts]
    blocks = [
        page.text(f"Work directory {workdir}. {_how_far(records, settings, look)}", quiet=True),
        *(page.text(why) for why in look.missing),
        page.tiles((what, value) for what, value in final_figures(records, _best_metric(settings)) if value != NONE),
        page.section("Curves", page.charts(charts) if charts else page.text("No metrics have been written yet.")),
    ]
    for drawn, block in look_sections(look):
        pictures += drawn
        blocks.append(block)
    blocks += [
        _settings(settings, command),
        page.section(
            "Versions and hardware",
            page.text("From the process that wrote this page.", quiet=True),
            page.table(("what", "which"), [*_versions(), *_hardware()]),
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
    validated = [record for record in records if record["split"] == "validation"]
    scores = {record["step"]: score_figures(record, _best_metric(settings)) for record in validated}
    patience = settings.get("train", {}).get("patience_epochs", 0)
    is_early = look.timeline.stalled_since(scores, patience) is not None
    return is_early or _last_step(records) >= look.timeline.total_steps


def _best_metric(settings: dict[str, Any]) -> str:
    return settings.get("checkpoint", {}).get("best_metric", "")


def _last_step(records: Sequence[Record]) -> int:
    return max((record["step"] for record in records), default=0)


def _versions() -> list[tuple[str, str]]:
    """Returns the versions of this package, Python and the libraries that affect results."""
    rows = [("densenet_jax", __version__), ("python", platform.python_version())]
    for name in _LIBRARIES:
        try:
            rows.append((name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            rows.append((name, "not installed"))
    return rows


def _hardware() -> list[tuple[str, str]]:
    """Returns devices, processes, cores and memory."""
    kinds = collections.Counter(f"{device.platform} ({device.device_kind})" for device in jax.devices())
    rows = [
        ("devices", ", ".join(f"{count} × {kind}" for kind, count in kinds.items())),
        ("processes", str(jax.process_count())),
        ("machine", f"{platform.system()} {platform.machine()}"),
        ("cores", str(os.cpu_count())),
    ]
    if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        rows.append(("memory", f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.1f} GiB"))
    return rows


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
