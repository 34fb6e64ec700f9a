"""A model's parameters as a table."""

import jax
from clu import parameter_overview

from densenet_jax.experiment import Experiment


def parameter_table(experiment: Experiment) -> tuple[str, int]:
    """Name, shape, dtype and size of every parameter, and how many numbers they are, without making them."""
    params = jax.eval_shape(experiment.state_recipe.init_variables)["params"]
    table = parameter_overview.get_parameter_overview(params, include_stats=False)
    return table, int(parameter_overview.count_parameters(params))
