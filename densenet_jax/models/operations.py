"""Counts multiply-adds of convolutions and matrix products, as papers do."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core

from densenet_jax.kernels.cpu.primitive import plain_kernels


def count_multiply_adds(function: Callable[..., Any], *arguments: Any) -> int:
    """Counts multiply-adds of all convolutions and matrix products in one call of `function`, which is only traced.

    Normalization, activation and pooling are not counted, as in the tables of the papers and of timm ("GMACs") and
    torchvision ("GFLOPS"). In a choice between branches the largest counts.
    """
    with plain_kernels():  # so that convolutions are XLA's
        return _count(jax.make_jaxpr(function)(*arguments).jaxpr)


def _count(jaxpr: core.Jaxpr) -> int:
    return sum(_count_equation(equation) for equation in jaxpr.eqns)


def _count_equation(equation: core.JaxprEqn) -> int:
    name, parameters = equation.primitive.name, equation.params
    if name == "conv_general_dilated":
        kernel = _shape(equation.invars[1])
        out_features = kernel[parameters["dimension_numbers"].rhs_spec[0]]
        return math.prod(_shape(equation.outvars[0])) * (math.prod(kernel) // out_features)
    if name == "dot_general":
        contracted, _ = parameters["dimension_numbers"][0]
        shape = _shape(equation.invars[0])
        return math.prod(_shape(equation.outvars[0])) * math.prod(shape[axis] for axis in contracted)
    inner = [_count(jaxpr) for jaxpr in _inner(parameters)]
    if name == "cond":
        return max(inner)
    return sum(inner) * parameters.get("length", 1)


def _shape(variable: Any) -> tuple[int, ...]:
    return variable.aval.shape


def _inner(parameters: dict[str, Any]) -> list[core.Jaxpr]:
    """Returns the programs that an equation calls."""
    programs = []
    for value in parameters.values():
        for entry in value if isinstance(value, tuple | list) else (value,):
            entry = getattr(entry, "jaxpr", entry)
            if isinstance(entry, core.Jaxpr):
                programs.append(entry)
    return programs
