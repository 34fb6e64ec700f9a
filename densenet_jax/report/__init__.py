"""The page that tells what a run has done, for a person: figures, pictures, settings and the way on."""

from densenet_jax.report.compare import report_comparison
from densenet_jax.report.run import report_run

__all__ = ["report_comparison", "report_run"]
