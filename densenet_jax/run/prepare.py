"""Prepares and verifies a data set, with a bar for each part of the work."""

from typing import Any

from densenet_jax.data.prepare import SplitReport, prepare_dataset
from densenet_jax.errors import UserError
from densenet_jax.system.console import Bar, print_status


def prepare_and_verify(name: str, directory: str, **options: Any) -> dict[str, int]:
    """Prepares what is not yet prepared, decodes every image and returns the number of images of each split.

    Args:
        options: further ones of `densenet_jax.data.prepare.prepare_dataset`.

    Raises:
        UserError: the set can't be prepared, has damaged images (named on standard error), or another number of them
            than a complete data set.
    """
    bars: dict[str, Bar] = {}

    def progress(what: str, done: int, total: int) -> None:
        if what not in bars:
            for bar in bars.values():
                bar.close()
            bars[what] = Bar(what, total)
        bars[what].move_to(done)

    try:
        reports = prepare_dataset(name, directory, progress=progress, **options)
    finally:
        for bar in bars.values():
            bar.close()
    if faults := [fault for report in reports for fault in _faults(report)]:
        raise UserError(f"{name} is prepared, but has {', '.join(faults)}; see the lines above.")
    return {report.split: report.examples for report in reports}


def _faults(report: SplitReport) -> list[str]:
    print_status(f"{report.split}: {report.examples} images, {len(report.damaged)} damaged")
    for name, why in report.damaged:
        print_status(f"  {name}: {why}")
    faults = []
    if report.damaged:
        faults.append(f"{len(report.damaged)} damaged images in {report.split}")
    if report.expected not in (None, report.examples):
        faults.append(f"{report.examples} images in {report.split} instead of {report.expected}")
    return faults
