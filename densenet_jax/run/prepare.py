"""Prepares and verifies a data set, with a bar for each part of the work."""

import contextlib
from typing import Any

from densenet_jax.data.prepare import SplitReport, prepare_dataset
from densenet_jax.data.settings import Labels, TableSettings
from densenet_jax.errors import UserError
from densenet_jax.system.console import Bar, print_status


def prepare_and_verify(config: Any) -> dict[str, int]:
    """Prepares the data set of `config.data` if need be, decodes every image and returns the number of each split.

    Raises:
        UserError: the set can't be prepared, has damaged images (named on standard error), or another number of them
            than a complete data set.
    """
    name = config.data.name
    bars: dict[str, Bar] = {}

    def progress(what: str, done: int, total: int) -> None:
        if what not in bars:
            opened.close()  # the bar before
            bars[what] = opened.enter_context(contextlib.closing(Bar(what, total)))
        bars[what].move_to(done)

    with contextlib.ExitStack() as opened:
        reports = prepare_dataset(
            name,
            config.data.dir,
            progress=progress,
            pixel_range=tuple(config.data.pixel_range),
            dicom_frame=config.data.dicom_frame,
            table=TableSettings.from_config(config),
            labels=Labels.from_config(config),
        )
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
