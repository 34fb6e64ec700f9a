"""Report page that puts several runs side by side."""

import itertools
import os
from collections.abc import Sequence

from densenet_jax.config.run_settings import read_settings
from densenet_jax.errors import UserError
from densenet_jax.report import page
from densenet_jax.report.curves import NONE, compare_charts, final_figures
from densenet_jax.report.settings import different_settings
from densenet_jax.run.metrics_file import read_metrics
from densenet_jax.system.console import print_status


def report_comparison(compared: Sequence[str], into: str) -> str:
    """Writes `into/report/compare.html` about the runs in `compared` and returns its path.

    If `into` is itself a run's directory, that run comes first. A directory named twice counts once.

    Raises:
        UserError: a directory is not a run's, or there are fewer than two runs.
    """
    own = [into] if os.path.exists(os.path.join(into, "config.json")) else []
    chosen = list({os.path.realpath(workdir): workdir for workdir in (*own, *compared)}.values())
    settings = [read_settings(workdir) for workdir in chosen]
    if len(chosen) < 2:
        raise UserError(f"--compare names only {chosen[0]}, but two runs are needed; give --compare DIR once for each.")
    names = _short_names(chosen)
    records = {name: read_metrics(workdir) for name, workdir in zip(names, chosen, strict=True)}
    charts = [chart.render() for chart in compare_charts(records)]
    metrics = [stored.get("checkpoint", {}).get("best_metric", "") for stored in settings]
    figures = [dict(final_figures(records[name], metric)) for name, metric in zip(names, metrics, strict=True)]
    rows = [(what, *(run.get(what, NONE) for run in figures)) for what in dict.fromkeys(itertools.chain(*figures))]
    numbers = tuple(range(1, len(names) + 1))
    different = different_settings(settings)
    content = page.document(
        f"{len(names)} runs side by side",
        page.section("Final figures", page.table(("", *names), rows, numbers=numbers)),
        page.section("Curves", page.charts(charts) if charts else page.text("No metrics have been written yet.")),
        page.section(
            "Settings that differ",
            page.table(("setting", *names), different) if different else page.text("None: all settings are alike."),
        ),
        page.section("Work directories", page.table(("run", "directory"), zip(names, chosen, strict=True))),
    )
    path = page.write_page(into, "compare.html", content, [picture for _, picture in charts])
    print_status(f"report: {path}")
    return path


def _short_names(workdirs: Sequence[str]) -> list[str]:
    """Shortens paths to as few trailing parts as keep them distinct."""
    parts = [os.path.normpath(os.path.abspath(workdir)).split(os.sep) for workdir in workdirs]
    for count in range(1, max(map(len, parts)) + 1):
        names = [os.sep.join(part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return list(workdirs)
