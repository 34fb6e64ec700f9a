"""From checked settings to the parts of a run. Nothing else in the package reads the settings."""

from densenet_jax.experiment.experiment import Experiment
from densenet_jax.experiment.samples import AugmentedSamples, augmented_samples

__all__ = ["AugmentedSamples", "Experiment", "augmented_samples"]
