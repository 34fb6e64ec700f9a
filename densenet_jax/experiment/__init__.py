"""From checked settings to the parts of a run. Nothing else in the package reads the settings."""

from densenet_jax.experiment.experiment import Experiment

__all__ = ["Experiment"]
