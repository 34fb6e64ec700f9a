"""Draws charts for light and dark pages that color-blind readers can read too.

Lines differ in color (Okabe and Ito's palette), dash and marker at once.
"""

import dataclasses
import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from PIL import Image

from densenet_jax.data.pixels import to_picture
from densenet_jax.predict.explain import draw_overlay, to_rgb
from densenet_jax.report.page import Picture
from densenet_jax.scores.calibration import Reliability

_SIZE_INCHES = (5.4, 3.4)
_DPI = 150
_MOST_BARS = 40  # classes up to which the balance chart has a bar for each
_GAP_PX = 4  # between two images in one picture
_MOST_NUMBERED = 16  # classes up to which confusion counts fit into their cells
_SHORTEST_PX = 160  # smaller images are enlarged to about this
_LONGEST_PX = 224  # larger ones are reduced to this
_STYLES = (("-", "o"), ("--", "s"), ("-.", "^"), (":", "D"), ((0, (5, 1, 1, 1, 1, 1)), "v"), ((0, (8, 2)), "P"))


@dataclasses.dataclass(frozen=True)
class Theme:
    """Colors of a page: its own and those of the lines, best to tell apart first."""

    page: str
    ink: str
    grid: str
    lines: tuple[str, ...]


LIGHT = Theme("#ffffff", "#1b1b1b", "#d6d6d6", ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"))
DARK = Theme("#16181d", "#e8e8e8", "#3c4048", ("#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#F0E442", "#D55E00"))


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of a chart."""

    label: str
    xs: Sequence[float] | np.ndarray
    ys: Sequence[float] | np.ndarray  # values; one that is not finite leaves a gap
    marked: bool = False  # whether each value gets a marker
    style: int = 0  # number of its color, dash and marker; a number looks the same in every chart


@dataclasses.dataclass(frozen=True)
class Chart:
    """A chart over epochs."""

    name: str  # of its file, without extension
    title: str
    y_label: str
    lines: Sequence[Line]  # those without values are left out
    percent: bool = False
    y_from_zero: bool = False
    logarithmic: bool = False  # whether the vertical axis is, if all values are positive and span more than a decade

    def render(self) -> tuple[str, Picture]:
        """Draws the chart for light and dark pages and returns its title and picture."""
        shown = ", ".join(line.label for line in self.lines if len(line.xs))
        return self.title, make_picture(self.name, f"{self.title} over epochs: {shown}", line_chart, self)


def make_picture(name: str, alt: str, draw: Callable[..., bytes], *arguments: Any, **options: Any) -> Picture:
    """Draws a chart for light and dark pages: `draw(*arguments, **options)` in both themes."""
    light, dark = (draw(*arguments, **options, theme=theme) for theme in (LIGHT, DARK))
    return Picture(name, light, alt, dark)


def line_chart(chart: Chart, *, theme: Theme = LIGHT) -> bytes:
    """Draws the lines of a chart over a common axis as a PNG."""
    figure, axes = make_axes(theme)
    drawn = [line for line in chart.lines if len(line.xs)]
    draw_lines(axes, drawn, theme)
    finite = np.array([value for line in drawn for value in line.ys if np.isfinite(value)])
    if chart.logarithmic and len(finite) and finite.min() > 0 and finite.max() > 10 * finite.min():
        axes.set_yscale("log")
    elif chart.y_from_zero or (chart.percent and len(finite) and finite.min() >= 0 > axes.get_ylim()[0]):
        axes.set_ylim(bottom=0)
    if chart.percent:
        axes.yaxis.set_major_formatter(show_percent)
    axes.set_xlabel("epochs")
    axes.set_ylabel(chart.y_label)
    if len(drawn) > 1:
        axes.legend(frameon=False, labelcolor=theme.ink, fontsize=9)
    return to_png(figure)


def confusion_chart(counts: np.ndarray, class_names: Sequence[str], *, theme: Theme = LIGHT) -> bytes:
    """Draws a confusion matrix, int [k, k], as a PNG: true classes in rows, predicted in columns, shaded by row."""
    return _matrix_chart(counts, counts.sum(axis=1), class_names, ("true", "predicted"), theme)


def together_chart(counts: np.ndarray, names: Sequence[str], *, theme: Theme = LIGHT) -> bytes:
    """Draws how often two labels come together, int [k, k], as a PNG, shaded by the share of the row's images."""
    return _matrix_chart(counts, counts.diagonal(), names, ("images that have", "and have"), theme)


def _matrix_chart(
    counts: np.ndarray, totals: np.ndarray, class_names: Sequence[str], axis_names: tuple[str, str], theme: Theme
) -> bytes:
    """Draws int [k, k] as a PNG with numbers and shades, each row as shares of its total."""
    figure, axes = make_axes(theme, (5.4, 5.0))
    shares = counts / np.maximum(totals, 1)[:, None]
    # The square root makes rare mistakes visible.
    shades = np.sqrt(shares)
    axes.imshow(shades, cmap="cividis", vmin=0, vmax=1)
    names = list(map(_shorten, class_names))
    places = range(len(names))
    axes.set_xticks(places, names, rotation=90 if max(map(len, names)) > 2 else 0, fontsize=8)
    axes.set_yticks(places, names, fontsize=8)
    axes.set_ylabel(axis_names[0])
    axes.set_xlabel(axis_names[1])
    if len(names) <= _MOST_NUMBERED:
        for row, column in zip(*np.nonzero(counts), strict=True):
            color = "black" if shades[row, column] > 0.55 else "white"
            axes.text(column, row, f"{counts[row, column]}", ha="center", va="center", fontsize=8, color=color)
    return to_png(figure)


def reliability_chart(reliability: Reliability, *, theme: Theme = LIGHT, many_labels: bool = False) -> bytes:
    """Draws accuracy over confidence, and below it the share of images at each confidence, as a PNG.

    With `many_labels` it is the share of images with a label over the label's probability.
    """
    names = ("accuracy", "images", "confidence of the prediction")
    right, share, sure = ("with the label", "labels", "probability of a label") if many_labels else names
    figure, (upper, lower) = make_axes(theme, (5.4, 4.4), rows=2, height_ratios=(3, 1))
    counts, bins = reliability.counts, len(reliability.counts)
    centers, shown = (np.arange(bins) + 0.5) / bins, reliability.counts > 0
    accuracy = reliability.right[shown] / counts[shown]
    upper.bar(centers[shown], accuracy, width=0.9 / bins, color=theme.lines[0], label=right)
    upper.plot((0, 1), (0, 1), color=theme.lines[1], linestyle="--", linewidth=1.4, label="perfectly calibrated")
    figure.legend(frameon=False, labelcolor=theme.ink, fontsize=9, loc="outside upper left", ncols=2)
    upper.set_ylabel(right)
    lower.bar(centers, counts / max(1, counts.sum()), width=0.9 / bins, color=theme.lines[2])
    lower.set_ylabel(share)
    lower.set_xlabel(sure)
    upper.set_ylim(0, 1)
    for axes in (upper, lower):
        axes.set_xlim(0, 1)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(show_percent)
        draw_grid(axes, theme)
    return to_png(figure)


def balance_chart(counts: Mapping[str, np.ndarray], class_names: Sequence[str], *, theme: Theme = LIGHT) -> bytes:
    """Draws the examples of each class as a PNG, the largest class first.

    Up to 40 classes are bars with their names; more are a curve on which the largest and the smallest are named.
    `counts` are int [k] by split, of which the first decides the order.
    """
    order = np.argsort(-next(iter(counts.values())), kind="stable")
    names = [_shorten(class_names[number]) for number in order]
    if len(order) <= _MOST_BARS:
        figure, axes = make_axes(theme, (5.4, 1.0 + 0.19 * len(order) * len(counts)))
        height = 0.8 / len(counts)
        for place, (split, values) in enumerate(counts.items()):
            ys = np.arange(len(order)) + height * (place - (len(counts) - 1) / 2)
            axes.barh(ys, values[order], height=0.92 * height, color=theme.lines[place], label=split)
        axes.set_yticks(range(len(order)), names)
        axes.invert_yaxis()
        axes.set_xlabel("examples")
    else:
        figure, axes = make_axes(theme)
        for place, (split, values) in enumerate(counts.items()):
            axes.step(np.arange(len(order)), values[order], where="mid", color=theme.lines[place], label=split)
        axes.set_xticks((0, len(order) - 1), (f"largest: {names[0]}", f"smallest: {names[-1]}"))
        for label, side in zip(axes.get_xticklabels(), ("left", "right"), strict=True):
            label.set_horizontalalignment(side)
        axes.set_ylim(bottom=0)
        axes.set_ylabel("examples")
    draw_grid(axes, theme, "x" if len(order) <= _MOST_BARS else "y")
    figure.legend(frameon=False, labelcolor=theme.ink, fontsize=9, loc="outside upper left", ncols=len(counts))
    return to_png(figure)


def evidence_picture(image: np.ndarray, activation_map: np.ndarray) -> bytes:
    """Draws integer [h, w, c] beside the same image with a class activation map, float [h, w], over it, as a PNG."""
    plain, overlay = to_rgb(image), draw_overlay(image, activation_map)
    smooth = max(plain.size) >= _SHORTEST_PX
    height = min(_LONGEST_PX, max(_SHORTEST_PX, plain.height))
    size = (max(1, round(plain.width * height / plain.height)), height)
    both = Image.new("RGB", (2 * size[0] + _GAP_PX, height), (127, 127, 127))
    both.paste(plain.resize(size, Image.Resampling.LANCZOS if smooth else Image.Resampling.NEAREST))
    both.paste(overlay.resize(size, Image.Resampling.LANCZOS), (size[0] + _GAP_PX, 0))
    return _encode(both)


def picture(image: np.ndarray) -> bytes:
    """Encodes uint8 or uint16 [h, w, c] as a PNG, enlarging small images by a whole factor and reducing large ones."""
    image = to_picture(image)
    pixels = Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)
    longest = max(pixels.size)
    if longest > _LONGEST_PX:
        width, height = (max(1, round(side * _LONGEST_PX / longest)) for side in pixels.size)
        pixels = pixels.resize((width, height), Image.Resampling.LANCZOS)
    elif longest < _SHORTEST_PX:
        times = -(-_SHORTEST_PX // longest)
        pixels = pixels.resize((pixels.width * times, pixels.height * times), Image.Resampling.NEAREST)
    return _encode(pixels)


def _encode(image: Image.Image, *, optimize: bool = True) -> bytes:
    file = io.BytesIO()
    image.save(file, format="png", optimize=optimize)
    return file.getvalue()


def make_axes(
    theme: Theme,
    size: tuple[float, float] = _SIZE_INCHES,
    *,
    columns: int = 1,
    rows: int = 1,
    height_ratios: Sequence[float] | None = None,
) -> tuple[Any, Any]:
    """Returns a figure in a theme's colors and its axes: one, or an array of columns * rows."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, facecolor=theme.page, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, height_ratios=height_ratios).ravel()
    for one in axes:
        one.set_facecolor(theme.page)
        one.tick_params(colors=theme.ink, labelsize=9)
        for label in (one.xaxis.label, one.yaxis.label):
            label.set(color=theme.ink, fontsize=9)
        for name, spine in one.spines.items():
            spine.set_color(theme.ink)
            spine.set_visible(name in ("left", "bottom"))
    return figure, axes if len(axes) > 1 else axes[0]


def show_percent(value: float, place: object = None) -> str:
    """Formats a share, as a tick of an axis."""
    return f"{100 * value:.4g} %"


def draw_lines(axes: Any, lines: Sequence[Line], theme: Theme) -> None:
    """Draws lines and a grid."""
    for line in lines:
        colors = len(theme.lines)
        dash, marker = _STYLES[(line.style + line.style // colors) % len(_STYLES)]  # no two of 36 look the same
        marks = {"marker": marker if line.marked or len(line.xs) == 1 else None, "markersize": 4.5}
        style = {"color": theme.lines[line.style % colors], "linestyle": dash, "linewidth": 1.8, **marks}
        axes.plot(line.xs, line.ys, label=_plain(line.label), **style)
    draw_grid(axes, theme)


def draw_grid(axes: Any, theme: Theme, axis: Literal["both", "x", "y"] = "both") -> None:
    """Draws a grid below everything else."""
    axes.grid(color=theme.grid, linewidth=0.6, axis=axis)
    axes.set_axisbelow(True)


def _shorten(name: str) -> str:
    """Cuts a class name to the room that an axis has."""
    return _plain(name if len(name) <= 14 else f"{name[:13]}…")


def _plain(text: str) -> str:
    """Escapes dollar signs, which would start a formula in matplotlib."""
    return text.replace("$", r"\$")


def to_png(figure: Any, dpi: int = _DPI) -> bytes:
    """Encodes a figure as a PNG. It is drawn once: `savefig` draws twice where axes are laid out by their labels."""
    figure.set_dpi(dpi)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # class names are in any script
        figure.canvas.draw()
    return _encode(Image.fromarray(np.asarray(figure.canvas.buffer_rgba())[:, :, :3]), optimize=False)
