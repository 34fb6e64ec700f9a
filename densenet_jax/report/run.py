"""From a run to its page."""

from densenet_jax.command import Command
from densenet_jax.experiment import Experiment


def report_run(experiment: Experiment, workdir: str, command: Command) -> str:
    """Writes the page about the run in `workdir` and returns its path."""
    raise NotImplementedError


def report_comparison(workdirs: list[str], into: str, command: Command) -> str:
    """Writes the page that puts runs side by side and returns its path."""
    raise NotImplementedError
