"""Pictures show what they are given, on both themes."""

import io
import itertools

import numpy as np
import pytest
from PIL import Image

from densenet_jax.report import plots
from densenet_jax.report.plots import (
    DARK,
    LIGHT,
    Chart,
    Line,
    balance_chart,
    confusion_chart,
    evidence_picture,
    line_chart,
    picture,
    reliability_chart,
)
from densenet_jax.scores.calibration import Reliability


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def rgb(color: str) -> np.ndarray:
    return np.array([int(color[start : start + 2], 16) for start in (1, 3, 5)])


def has(image: np.ndarray, color: str) -> bool:
    return bool((np.abs(image.astype(int) - rgb(color)).max(axis=-1) <= 2).any())


@pytest.mark.parametrize("theme", [LIGHT, DARK])
def test_chart_has_its_lines_on_its_page(theme):
    lines = [Line("a", [0, 1, 2], [1, 3, 2]), Line("b", [0, 2], [2, 2], marked=True, style=1)]
    image = pixels(line_chart(Chart("x", "title", "y", lines), theme=theme))
    assert (image[0, 0] == rgb(theme.page)).all()
    assert has(image, theme.lines[0])
    assert has(image, theme.lines[1])
    assert not has(image, theme.lines[3])


@pytest.mark.parametrize(
    "ys", [[], [0.5], [0.0, 1.0], [float("nan"), 2.0], [float("inf"), 1.0, 2.0], [-1.0, 1.0], [1e-30, 1e30]]
)
@pytest.mark.parametrize("logarithmic", [True, False])
def test_chart_of_few_or_odd_values_is_drawn(ys, logarithmic):
    lines = [Line("a", list(range(len(ys))), ys)]
    png = line_chart(Chart("x", "title", "$y", lines, logarithmic=logarithmic, percent=True))
    assert pixels(png).shape == (510, 810, 3)


def test_no_two_of_many_lines_look_the_same():
    # What matplotlib gets for each line: color, dash and marker.
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    plots.draw_lines(axes, [Line(str(style), [0, 1], [0, 1], marked=True, style=style) for style in range(36)], LIGHT)
    looks = [(line.get_color(), str(line._dash_pattern), line.get_marker()) for line in axes.lines]
    assert len(set(looks)) == 36
    for first, second in itertools.pairwise(looks[:6]):
        assert first[0] != second[0]
        assert first[2] != second[2]


def test_confusion_is_shaded_by_row():
    counts = np.array([[90, 10], [0, 1]])
    image = pixels(confusion_chart(counts, ["a$b$", "a very long name indeed"]))
    assert image.shape == (750, 810, 3)
    yellow, blue = (np.abs(image.astype(int) - color).max(axis=-1) <= 3 for color in ([254, 232, 56], [0, 34, 78]))
    assert yellow.sum() > 10_000  # the whole of the second row's diagonal
    assert blue.sum() > 10_000  # its empty cell


def test_class_names_of_any_script_and_classes_without_examples_are_drawn():
    confusion_chart(np.zeros((3, 3), int), ["猫", "собака", "🐟"])


@pytest.mark.parametrize(("channels", "dtype"), [(1, np.uint16), (3, np.uint16), (4, np.uint8), (64, np.uint16)])
def test_pictures_of_any_channels_and_depth(channels, dtype):
    image = np.full((8, 8, channels), np.iinfo(dtype).max // 2, dtype)
    assert (pixels(picture(image)) == 127).all()
    assert (pixels(evidence_picture(image, np.zeros((2, 2))))[:, :160] == 127).all()


def test_small_picture_is_enlarged_without_smoothing_and_large_one_reduced():
    image = np.arange(64, dtype=np.uint8).reshape(8, 8, 1)
    large = pixels(picture(image))
    assert large.shape == (160, 160, 3)
    np.testing.assert_array_equal(large[:, :, :1], image.repeat(20, axis=0).repeat(20, axis=1))
    assert pixels(picture(np.zeros((300, 600, 3), np.uint8))).shape == (112, 224, 3)
    assert pixels(picture(np.zeros((224, 224, 3), np.uint8))).shape == (224, 224, 3)


@pytest.mark.parametrize("theme", [LIGHT, DARK])
@pytest.mark.parametrize("classes", [1, 3, 40, 41])
def test_balance_names_its_classes(monkeypatch, theme, classes):
    written = []
    monkeypatch.setattr(plots, "_shorten", lambda name: written.append(name) or name)
    counts = np.arange(classes)
    names = [f"class {number}" for number in range(classes)]
    image = pixels(balance_chart({"train": counts, "evaluated": counts // 2}, names, theme=theme))
    assert written == names[::-1]  # the largest first
    assert has(image, theme.lines[0]) or classes == 1
    assert (image[0, 0] == rgb(theme.page)).all()


def test_reliability_shows_accuracy_at_each_confidence():
    reliability = Reliability(bins=10)
    reliability.add(np.full(4, 0.95), np.array([True, True, True, False]))
    image = pixels(reliability_chart(reliability))
    bar = np.abs(image.astype(int) - rgb(LIGHT.lines[0])).max(axis=-1) <= 2
    bar[:, :-200] = False  # the legend's
    height = bar.any(axis=1).sum()
    half = Reliability(bins=10)
    half.add(np.full(2, 0.95), np.array([True, False]))
    bar = np.abs(pixels(reliability_chart(half)).astype(int) - rgb(LIGHT.lines[0])).max(axis=-1) <= 2
    bar[:, :-200] = False
    assert abs(bar.any(axis=1).sum() / height - 0.5 / 0.75) < 0.05
    reliability_chart(Reliability())  # nothing to show, but no error


@pytest.mark.parametrize(("side", "shape"), [(8, (160, 324, 3)), (200, (200, 404, 3)), (600, (224, 452, 3))])
def test_evidence_stands_beside_the_image(side, shape):
    image, evidence = np.full((side, side, 1), 90, np.uint8), np.zeros((4, 4), np.float32)
    evidence[0, 0] = 1
    drawn = pixels(evidence_picture(image, evidence))
    assert drawn.shape == shape
    width = (shape[1] - 4) // 2
    assert (drawn[:, :width] == 90).all()
    assert (drawn[-20:, -20:] == 90).all()
    assert not (drawn[:20, width + 4 : width + 24] == 90).all()
