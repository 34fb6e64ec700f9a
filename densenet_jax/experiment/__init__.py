"""Makes the parts of a run from checked settings, which nothing else in the package reads."""

from densenet_jax.experiment.experiment import Experiment
from densenet_jax.experiment.samples import AugmentedSamples, augmented_samples

__all__ = ["AugmentedSamples", "Experiment", "augmented_samples"]
