"""Draws ratios with their quartiles and growth, and builds the page of all results."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence

from densenet_jax.report import page
from densenet_jax.report.plots import DARK, LIGHT, Line, Theme, draw_lines, make_axes, to_png
from versus.results import GROWTH, OURS, Growth, Ratio, Results, describe, falls, growths, newest, ratios

# An implementation looks the same in every chart.
STYLES = dict.fromkeys(OURS, 0) | {
    "torch_eager": 1, "onnxruntime": 2, "openvino": 3, "torch_compile": 4, "plain": 5, "tf_data": 1, "single": 1,
    "pillow_processes": 2, "densenet_jax_wheels": 3, "without_kernels": 2, "with_kernels": 3, "against": 2,
}  # fmt: skip
TITLE = ("mode", "protocol", "target")  # what a chart's title says of a case
MORE = ("batch_size", "clients")  # and if the chart would have too many rows
MOST_ROWS = 30
GROWN = ("densenet121", "dpn68", "rdnet_tiny", "densenet_bc_100_12")  # whose growth is drawn, one of each family
DPI = 110


def ratio_chart(shown: Sequence[Ratio], theme: Theme = LIGHT, dpi: int = DPI) -> bytes:
    """Draws each ratio as a mark between its quartiles, a row for each case, as a PNG."""
    sizes = {tuple(value for key, value in one.case if key in ("model", "image_size_px")) for one in shown}
    left_out = ("dtype", *(key for key in (*TITLE, *MORE) if len({dict(one.case).get(key) for one in shown}) == 1))
    if len(sizes) == len({size[:1] for size in sizes}):  # each model at one size
        left_out += ("image_size_px",)
    labels = {one.case: describe(one.case, left_out) or "all" for one in shown}
    labels = dict(sorted(labels.items(), key=lambda label: [*map(_number_or_text, re.split(r"(\d+)", label[1]))]))
    names = list(dict.fromkeys(one.against for one in shown))
    figure, axes = make_axes(theme, (5.4, 1.0 + (0.1 + 0.12 * len(names)) * len(labels)))
    for place, name in enumerate(names):
        own = [one for one in shown if one.against == name]
        rows = [list(labels).index(one.case) + (place - (len(names) - 1) / 2) * 0.6 / len(names) for one in own]
        values = [one.value for one in own]
        errors = [[max(0, one.value - one.low) for one in own], [max(0, one.high - one.value) for one in own]]
        style = STYLES.get(name, 5)
        axes.errorbar(values, rows, xerr=errors, fmt="osD^vP"[style % 6], markersize=4, elinewidth=1.3,
                      color=theme.lines[style % 6], label=f"times {name}")  # fmt: skip
    axes.axvline(1, color=theme.ink, linewidth=0.9, linestyle="--")
    lowest, highest = min(one.low for one in shown), max(one.high for one in shown)
    if highest > 8 * lowest:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_yticks(range(len(labels)), list(labels.values()), fontsize=8)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.set_xlabel("times as fast" if "target" not in dict(shown[0].case) else "times fewer bytes")
    axes.grid(color=theme.grid, linewidth=0.6)
    axes.set_axisbelow(True)
    figure.legend(frameon=False, labelcolor=theme.ink, fontsize=9, loc="outside upper left", ncols=2)
    return to_png(figure, dpi)


def _number_or_text(part: str) -> tuple[int, str]:
    return (int(part), "") if part.isdigit() else (0, part)


def growth_chart(shown: Sequence[Growth], columns: int = 1, theme: Theme = LIGHT, dpi: int = DPI) -> bytes:
    """Draws growths side by side as a PNG; several have their case as a title."""
    rows = -(-len(shown) // columns)
    size = (5.4, 3.2) if len(shown) == 1 else (2.9 * columns, 2.5 * rows + 0.3)
    figure, axes = make_axes(theme, size, columns=columns, rows=rows)
    panels = [axes] if len(shown) == 1 else list(axes)
    known = {}
    for panel, one in zip(panels, shown, strict=False):
        lines = [
            Line(name, *zip(*points, strict=True), marked=True, style=STYLES.get(name, 5))
            for name, points in one.lines.items()
            if len(points) > 1
        ]
        draw_lines(panel, lines, theme)
        known |= {handle.get_label(): handle for handle in panel.get_lines()}
        panel.set_ylim(bottom=0)
        panel.set_xlabel(GROWTH[one.axis])
        panel.set_ylabel(one.quantity)
        panel.set_xticks(sorted({x for line in lines for x in line.xs}))
        if len(shown) > 1:
            panel.set_title(describe(one.case, ("dtype",)), fontsize=8, color=theme.ink)
    for panel in panels[len(shown) :]:
        panel.set_visible(False)
    figure.legend(known.values(), known, frameon=False, labelcolor=theme.ink, fontsize=9,
                  loc="outside upper left", ncols=4)  # fmt: skip
    return to_png(figure, dpi)


def groups(every: Sequence[Ratio]) -> dict[tuple[str, str, str], list[Ratio]]:
    """Groups the newest ratios by (device, benchmark, title of their chart)."""
    shown = [now for now, _ in newest(every)]

    def group(ratios: Sequence[Ratio], keys: Sequence[str]) -> dict[tuple[str, str, str], list[Ratio]]:
        grouped = defaultdict(list)
        for one in ratios:
            title = describe(tuple(entry for entry in one.case if entry[0] in keys))
            grouped[one.device, one.benchmark, title].append(one)
        return grouped

    wide = group(shown, TITLE)
    return {
        key: part
        for whole, same in wide.items()
        for key, part in (
            group(same, (*TITLE, *MORE)) if len({one.case for one in same}) > MOST_ROWS else {whole: same}
        ).items()
    }


def drawn_growths(results: Sequence[Results]) -> list[Growth]:
    """Returns the newest growth of each quantity, axis and case on each kind of machine, for one model a family."""
    latest: dict[object, Growth] = {}
    for one in results:
        for growth in growths(one):
            if dict(growth.case).get("model", GROWN[0]) in GROWN:
                latest[one.benchmark, one.device, growth.axis, growth.quantity, growth.case] = growth
    return list(latest.values())


def build_page(results: Sequence[Results]) -> tuple[str, list[page.Picture]]:
    """Returns the page of all results and its pictures."""
    every = ratios(results)
    pictures: list[page.Picture] = []
    entries: dict[str, list[tuple[str, page.Picture]]] = defaultdict(list)

    def add(device: str, title: str, light: bytes, dark: bytes) -> None:
        name = f"benchmark_{len(pictures):02d}"
        pictures.append(page.Picture(name, light, f"{title}, {device}", dark))
        entries[device].append((title, pictures[-1]))

    for (device, benchmark, title), shown in groups(every).items():
        add(device, f"{benchmark}: {title or 'all'}", ratio_chart(shown), ratio_chart(shown, DARK))
    for one in drawn_growths(results):
        title = f"{one.results.benchmark}: {one.quantity} by {GROWTH[one.axis]}; {describe(one.case, ('dtype',))}"
        add(one.results.device, title, growth_chart([one]), growth_chart([one], theme=DARK))
    sections = [page.section(device, page.charts(charts)) for device, charts in entries.items()]
    fallen = falls(every)
    return page.document(
        "Benchmarks",
        page.text(
            "Ratios above 1: this project is faster, or moves fewer bytes. A bar reaches from the worse quartile of "
            "this project over the better one of the other to the reverse."
        ),
        page.section(
            "Fell since the last result",
            *(page.text(describe_fall(*pair)) for pair in fallen),
            *([] if fallen else [page.text("None by more than its spread.")]),
        ),
        *sections,
        page.section("Files", file_table(results)),
        page.section("All ratios", page.fold("every case", ratio_table(every))),
    ), pictures


def file_table(results: Sequence[Results]) -> str:
    """Lists the result files."""
    rows = [(one.path.name, one.date[:10], one.device, str(len(one.rows))) for one in reversed(results)]
    return page.table(("file", "date", "machine", "rows"), rows, numbers=(3,))


def ratio_table(every: Sequence[Ratio]) -> str:
    """Lists the newest ratio of each case with the one before."""
    rows = []
    for now, before in newest(every):
        figures = (f"{now.value:.2f}", f"{now.low:.2f} to {now.high:.2f}", f"{before.value:.2f}" if before else "-")
        rows.append((now.benchmark, describe(now.case), now.against, *figures, now.device))
    headings = ("benchmark", "case", "times", "ratio", "quartiles", "before", "machine")
    return page.table(headings, rows, numbers=(3, 4, 5))


def describe_fall(now: Ratio, before: Ratio) -> str:
    """Says in a line what fell."""
    return (
        f"{now.benchmark}, {describe(now.case)}: {now.value:.2f} times {now.against} ({now.low:.2f} to "
        f"{now.high:.2f}) on {now.date[:10]}, {before.value:.2f} ({before.low:.2f} to {before.high:.2f}) on "
        f"{before.date[:10]}; {now.device}"
    )


def document_figures(results: Sequence[Results]) -> dict[str, bytes]:
    """Returns the pictures of docs/performance.md by file name, each ratio's from the newest file of most networks."""

    def count_networks(drawn: Sequence[Ratio]) -> int:
        return len({dict(one.case)["model"] for one in drawn})

    figures = {}
    wanted = {"training": ("train_step", ("mode", "train")), "inference": ("latency", ("batch_size", 1))}
    for name, (benchmark, entry) in wanted.items():
        files = [
            [one for one in ratios([file]) if entry in one.case] for file in results if file.benchmark == benchmark
        ]
        # Results come oldest first.
        if largest := max(reversed(files), key=count_networks, default=[]):
            figures[f"benchmark_{name}.png"] = ratio_chart(largest, dpi=90)
    grown, best = drawn_growths(results), []
    for quantity in ("images/s", "peak memory, MiB"):
        for axis in GROWTH:
            same = [one for one in grown if (one.quantity, one.axis) == (quantity, axis)]
            rank = [
                (("mode", "train") in one.case, sum(map(len, one.lines.values())), one.results.date) for one in same
            ]
            best += [one for one, place in zip(same, rank, strict=True) if place == max(rank)]
    if best:
        figures["benchmark_growth.png"] = growth_chart(best, columns=3, dpi=90)
    return figures
