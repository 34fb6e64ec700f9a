"""Interprets a traced function, but puts off its elementwise operations on arrays, for `elementwise` to compute."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import Literal
from jaxtyping import Array

from densenet_jax.kernels.cpu.primitive import DTYPES

BINARY, UNARY = ("add", "sub", "mul", "div", "max", "min"), ("sqrt", "neg", "abs")
_INLINED = ("jit", "closed_call")


@dataclasses.dataclass(eq=False)
class Lazy:
    """An elementwise operation on arrays that is not computed yet; its operands are arrays, numbers and other such."""

    equation: Any
    operands: tuple[Any, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The result's shape."""
        return self.equation.outvars[0].aval.shape

    @property
    def dtype(self) -> Any:
        """The result's dtype."""
        return self.equation.outvars[0].aval.dtype

    @functools.cached_property
    def computed(self) -> Array:
        """Computes it by XLA."""
        return _bind(self.equation, [compute_now(operand) for operand in self.operands])[0]


def compute_now(value: Any) -> Any:
    """Returns the array of a value, by XLA if it was put off."""
    return value.computed if isinstance(value, Lazy) else value


def _bind(equation: Any, operands: Sequence[Any]) -> list[Any]:
    params = equation.primitive.get_bind_params(equation.params)
    functions, params = params if isinstance(params, tuple) else ((), params)  # before JAX 0.10 a pair
    results = equation.primitive.bind(*functions, *operands, **params)
    return list(results) if equation.primitive.multiple_results else [results]


class Interpreter:
    """Runs traced functions as `jax.core.eval_jaxpr` does, with `Lazy` values among the results."""

    def __init__(self) -> None:
        self._scalars: dict[Any, list[Any]] = {}  # equal operations on scalars are computed once

    def run(self, traced: Any, inputs: Sequence[Any]) -> list[Any]:
        """Returns the outputs, some of them `Lazy`."""
        values: dict[Any, Any] = dict(zip(traced.jaxpr.constvars, traced.consts, strict=True))
        values |= zip(traced.jaxpr.invars, inputs, strict=True)

        def value_of(atom: Any) -> Any:
            return atom.val if isinstance(atom, Literal) else values[atom]

        for equation in traced.jaxpr.eqns:
            operands = [value_of(atom) for atom in equation.invars]
            values |= zip(equation.outvars, self._results(equation, operands), strict=True)
        return [value_of(atom) for atom in traced.jaxpr.outvars]

    def _results(self, equation: Any, operands: list[Any]) -> list[Any]:
        name, made = equation.primitive.name, equation.outvars[0].aval
        same_dtype = name == "convert_element_type" and made.dtype == equation.invars[0].aval.dtype
        if made.shape and (name == "copy" or same_dtype):
            return operands
        if name in _INLINED and any(out.aval.shape for out in equation.outvars):
            return self.run(equation.params["jaxpr"], operands)
        if made.shape and made.dtype in DTYPES and _is_elementwise(equation, made.shape):
            return [Lazy(equation, tuple(operands))]
        if any(np.shape(operand) for operand in operands):
            return _bind(equation, [compute_now(operand) for operand in operands])
        key = (name, str(equation.params), tuple(map(identity, operands)))
        if key not in self._scalars:
            self._scalars[key] = _bind(equation, operands)
        return self._scalars[key]


def _is_elementwise(equation: Any, shape: tuple[int, ...]) -> bool:
    """Whether an equation is an operation of the kernels or made of them; scalars stand for arrays."""
    name, shapes = equation.primitive.name, [atom.aval.shape for atom in equation.invars]
    if name == "broadcast_in_dim":
        return shapes == [()]
    if any(other not in ((), shape) for other in shapes):
        return False
    if name == "select_n":
        return len(shapes) == 3 and shapes[0] == ()
    return name in BINARY + UNARY or name == "square" or (name == "integer_pow" and equation.params["y"] in (1, 2, 3))


def identity(scalar: Any) -> Any:
    """Returns a key that equal scalars share: their value where it is known, else the tracer."""
    if isinstance(scalar, jax.Array):
        return id(scalar)
    value = np.asarray(scalar)
    return str(value.dtype), value.item()
