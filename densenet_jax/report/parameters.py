"""Table of a model's parameters, and the cost of one image."""

from typing import Any

import jax
import jax.numpy as jnp
from clu import parameter_overview

from densenet_jax.experiment import Experiment
from densenet_jax.models.densenet import PLAIN, DenseNet
from densenet_jax.models.operations import count_multiply_adds


def parameter_table(experiment: Experiment) -> tuple[str, dict[str, Any]]:
    """Lists name, shape, dtype and size of every parameter without allocating them.

    Returns:
        The table, and {"parameters": their number, "multiply_adds": of one image in evaluation, counted as in the
        papers, "image_size_px"}.
    """
    variables = jax.eval_shape(experiment.state_recipe.init_variables)
    table = parameter_overview.get_parameter_overview(variables["params"], include_stats=False)
    shape = experiment.data.eval_shape[-3:]
    image = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    model = experiment.model
    if isinstance(model, DenseNet):
        model = model.clone(implementation=PLAIN)
    multiply_adds = count_multiply_adds(
        lambda variables, image: model.apply(variables, image, train=False), variables, image
    )
    count = int(parameter_overview.count_parameters(variables["params"]))
    return table, {"parameters": count, "multiply_adds": multiply_adds, "image_size_px": shape[0]}
