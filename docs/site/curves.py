"""Draws accuracy and loss of a finished run of the digits side by side, the picture of README.md.

python docs/site/curves.py runs/digits docs/digits.png
"""

import pathlib
import sys

from densenet_jax.report import plots
from densenet_jax.run.metrics_file import read_metrics


def draw_curves(workdir: str, path: str) -> None:
    """Draws the metrics of the run in `workdir` into the PNG file `path`."""
    records = read_metrics(workdir)
    figure, axes = plots.make_axes(plots.LIGHT, (8.0, 2.9), columns=2)
    for chart, key, label in zip(axes, ("top1", "loss"), ("top-1 accuracy", "loss, nats"), strict=True):
        lines = []
        for style, split in enumerate(("train", "validation")):
            points = [(one["epoch"], one[key]) for one in records if one["split"] == split]
            marked = split == "validation" and len(points) < 30
            lines.append(plots.Line(split, *zip(*points, strict=True), marked=marked, style=style))
        plots.draw_lines(chart, lines, plots.LIGHT)
        chart.set_xlabel("epochs")
        chart.set_ylabel(label)
    axes[0].yaxis.set_major_formatter(plots.show_percent)
    axes[1].set_yscale("log")
    axes[0].legend(frameon=False)
    pathlib.Path(path).write_bytes(plots.to_png(figure, dpi=110))


if __name__ == "__main__":
    draw_curves(*sys.argv[1:])
