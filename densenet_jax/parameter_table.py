"""A model's parameters as a table, and what one image costs."""

from typing import Any

import jax
import jax.numpy as jnp
from clu import parameter_overview

from densenet_jax.experiment import Experiment
from densenet_jax.models.operations import count_multiply_adds


def parameter_table(experiment: Experiment) -> tuple[str, dict[str, Any]]:
    """Name, shape, dtype and size of every parameter, without making them, and their sum.

    Returns:
        The table, and `parameters` (how many numbers), `multiply_adds` (of one evaluated image) and `image_size_px`.
    """
    variables = jax.eval_shape(experiment.state_recipe.init_variables)
    table = parameter_overview.get_parameter_overview(variables["params"], include_stats=False)
    shape = experiment.data.eval_shape[-3:]
    image = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    multiply_adds = count_multiply_adds(
        lambda variables, image: experiment.model.apply(variables, image, train=False), variables, image
    )
    count = int(parameter_overview.count_parameters(variables["params"]))
    return table, {"parameters": count, "multiply_adds": multiply_adds, "image_size_px": shape[0]}
