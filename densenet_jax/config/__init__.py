"""Settings: the rules that they follow, the recipes that set them, and those of a run that exists. Loads no JAX."""

from densenet_jax.config.rules import RULES, check_config, check_mean_std, flatten, to_dict

__all__ = ["RULES", "check_config", "check_mean_std", "flatten", "to_dict"]
