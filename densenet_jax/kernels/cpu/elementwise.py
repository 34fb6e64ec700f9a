"""Elementwise operations on many arrays in one call of the CPU kernels, such as an optimizer's update.

XLA compiles a loop for each shape and runs one loop an array: hundreds for a network's parameters, each with a copy of
its array where an update in place can't be proven safe. Here the function is traced as it is, and its elementwise
operations on arrays are collected into programs, one for all arrays that are treated alike. Everything else, such as
norms or a schedule, is left to XLA.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from densenet_jax.kernels.cpu.lazy import BINARY, UNARY, Interpreter, Lazy, compute_now, identity
from densenet_jax.kernels.cpu.primitive import DTYPES, call_kernel, define, is_available

# Operations in the order of native/elementwise.h. The last one is select_n: its third operand where the first is not 0.
_NAMES = (*BINARY, *UNARY, "select_n")
_OPERANDS = (*(2 for _ in BINARY), *(1 for _ in UNARY), 3)


def update_in_place(function: Callable[..., Any], state: Any, *others: Any) -> Any:
    """Computes function(state, *others), a tree of state's structure, into the state's memory where that is donated.

    Without the kernels, and on other platforms, the function is just called.
    """
    leaves, treedef = jax.tree.flatten((state, *others))
    if not is_available():
        return function(state, *others)

    def of_leaves(*leaves: Any) -> Any:
        return function(*jax.tree.unflatten(treedef, leaves))

    traced, shape = jax.make_jaxpr(of_leaves, return_shape=True)(*leaves)
    outputs = Interpreter().run(traced, leaves)
    results = _compute_delayed(outputs, jax.tree.leaves(state))
    return jax.tree.unflatten(jax.tree.structure(shape), results)


def map_fronts(
    function: Callable[..., Any], items: Sequence[tuple[Float[Array, " _"], ...]]
) -> list[Float[Array, " _"]]:
    """Computes an elementwise function of each item's vectors, in one call, into the front of its first vector.

    A function of vectors of several lengths takes their fronts, as long as the shortest; what is behind it in the first
    vector is kept. All have one dtype that the kernels support. The function is traced once and has to be hashable.
    """
    program, order = _trace_of_vectors(function, len(items[0]), items[0][0].dtype)
    operands = [program.scalar_vector(), *(item[i] for item in items for i in order)]
    aliases = tuple((1 + number * len(order) + order.index(0), number) for number in range(len(items)))
    return _bind_program(program, operands, aliases, [item[0].shape for item in items], len(items))


def compute(
    function: Callable[..., tuple[Array, ...]], *vectors: Float[Array, "..."]
) -> tuple[Float[Array, "..."], ...]:
    """Computes an elementwise function of several arrays, which returns a tuple of such, in one call.

    Without the kernels, for arrays of different shapes or dtypes and on other platforms, the function is just called.
    It is traced once and has to be hashable.
    """
    if not are_usable(vectors) or len({vector.shape for vector in vectors}) > 1:
        return function(*vectors)
    program, order = _trace_of_vectors(function, len(vectors), vectors[0].dtype)
    operands = [program.scalar_vector(), *(vectors[number] for number in order)]
    return tuple(_bind_program(program, operands, (), [vectors[0].shape] * program.count_results(), 1))


@functools.lru_cache(maxsize=256)
def _trace_of_vectors(function: Callable[..., Any], count: int, dtype: Any) -> tuple[_Program, list[int]]:
    """Returns the program of a function of so many vectors, and the numbers of those that it reads."""
    stand_ins = [np.zeros(2, dtype) for _ in range(count)]
    traced = jax.make_jaxpr(function)(*stand_ins)
    with jax.ensure_compile_time_eval():  # what is kept may not belong to the program that is traced now
        program = _Program(Interpreter().run(traced, stand_ins))
    return program, [next(i for i, one in enumerate(stand_ins) if one is array) for array in program.arrays]


def square_sums(arrays: Sequence[Array]) -> Float[Array, " n"]:
    """Sums the squares of each array; all have one dtype that the kernels support."""
    return _square_sums_p.bind(*arrays)


def tail(vector: Float[Array, " _"], size: int) -> Float[Array, " {size}"]:
    """Returns the last values of a vector, of a dtype that the kernels support.

    XLA would fuse the slice into what reads it, which then is another loop for each length of the vector.
    """
    return _tail_p.bind(vector, size=size)


def hidden_number(number: int) -> Int[Array, ""]:
    """Returns a number that XLA doesn't know, so that loops that differ in nothing else are compiled once."""
    return _number_p.bind(number=number)


def are_usable(arrays: Sequence[Array]) -> bool:
    """Whether the kernels are available and support the arrays' dtype."""
    return bool(arrays) and is_available() and arrays[0].dtype in DTYPES and len({a.dtype for a in arrays}) == 1


class _Program:
    """Instructions for outputs that are computed from the same arrays, and the operands of these instructions."""

    def __init__(self, outputs: Sequence[Lazy]) -> None:
        self.arrays: list[Array] = []
        self.scalars: dict[Any, Any] = {}
        self._code: list[tuple[Any, ...]] = []
        self._places: dict[int, tuple[str, int]] = {}
        self._results = [self._place(output) for output in outputs]

    def _place(self, value: Any) -> tuple[str, int]:
        """Returns where a value is, ("array", "scalar" or "register", number), after the code that puts it there."""
        if not np.shape(value):
            key = identity(value)
            self.scalars.setdefault(key, value)
            return "scalar", list(self.scalars).index(key)
        if id(value) not in self._places:
            if isinstance(value, Lazy):
                self._places[id(value)] = self._operation(value)
            else:
                self.arrays.append(value)
                self._places[id(value)] = "array", len(self.arrays) - 1
        return self._places[id(value)]

    def _operation(self, value: Lazy) -> tuple[str, int]:
        name, operands = value.equation.primitive.name, [self._place(operand) for operand in value.operands]
        if name == "broadcast_in_dim":
            return operands[0]
        if name in ("square", "integer_pow"):
            base = place = operands[0]
            for _ in range(value.equation.params.get("y", 2) - 1):
                place = self._append("mul", place, base)
            return place
        return self._append(name, *operands)

    def _append(self, name: str, *operands: tuple[str, int]) -> tuple[str, int]:
        self._code.append((name, *operands, *(operands[:1] * (3 - len(operands)))))
        return "register", len(self._code) - 1

    def count_results(self) -> int:
        """Returns how many results the program has."""
        return len(self._results)

    def scalar_vector(self) -> Float[Array | np.ndarray, " s"]:
        """Returns the scalars in the arrays' dtype, as a constant where all are known."""
        dtype, scalars = self.arrays[0].dtype, self.scalars.values()
        if any(isinstance(scalar, jax.core.Tracer) for scalar in scalars):
            return jnp.stack([jnp.asarray(scalar).astype(dtype) for scalar in scalars])
        return np.array([np.asarray(scalar) for scalar in scalars], dtype)

    def encode(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Returns the code, four numbers an operation, and the registers of its results."""
        starts = {"array": 0, "scalar": len(self.arrays), "register": len(self.arrays) + len(self.scalars)}

        def number(place: tuple[str, int]) -> int:
            return starts[place[0]] + place[1]

        code = [n for name, *operands in self._code for n in (_NAMES.index(name), *map(number, operands))]
        return tuple(code), tuple(map(number, self._results))


def _bind_program(
    program: _Program,
    operands: Sequence[Array | np.ndarray],
    aliases: tuple[tuple[int, int], ...],
    shapes: Sequence[Any],
    items: int,
) -> list[Array]:
    code, results = program.encode()
    return _elementwise_p.bind(
        *operands, code=code, results=results, items=items, aliases=aliases, shapes=tuple(shapes)
    )


def _compute_delayed(outputs: list[Any], state: Sequence[Any]) -> list[Any]:
    """Computes the outputs that were put off, by one call for all groups that have the same program."""
    calls: dict[Any, list[tuple[list[int], _Program]]] = {}
    for numbers in _group_by_arrays(outputs):
        program = _Program([outputs[number] for number in numbers])
        dtype = outputs[numbers[0]].dtype
        if not program.arrays or {array.dtype for array in program.arrays} != {dtype} or 0 in program.arrays[0].shape:
            continue
        key = (*program.encode(), tuple(program.scalars), dtype)
        calls.setdefault(key, []).append((numbers, program))
    for items in calls.values():
        operands = [items[0][1].scalar_vector()]
        made: list[int] = []
        aliases: list[tuple[int, int]] = []
        for numbers, program in items:
            for number in numbers:
                aliases += [
                    (len(operands) + place, len(made))
                    for place, array in enumerate(program.arrays)
                    if array is state[number]
                ]
                made.append(number)
            operands += program.arrays
        shapes = [outputs[number].shape for number in made]
        computed = _bind_program(items[0][1], operands, tuple(aliases), shapes, len(items))
        for number, result in zip(made, computed, strict=True):
            outputs[number] = result
    return [compute_now(output) for output in outputs]


def _group_by_arrays(outputs: Sequence[Any]) -> list[list[int]]:
    """Returns the numbers of the outputs that are put off, those together that are computed from a common array."""
    groups: dict[int, list[int]] = {}  # of an array
    for number, output in enumerate(outputs):
        if isinstance(output, Lazy):
            arrays = list(_arrays_of(output))
            joined = {id(group): group for group in (groups.get(array) for array in arrays) if group is not None}
            members = [*sorted(other for group in joined.values() for other in group), number]
            groups |= dict.fromkeys([array for array, group in groups.items() if id(group) in joined] + arrays, members)
    return list({id(group): group for group in groups.values()}.values())


def _arrays_of(value: Any) -> set[int]:
    if not np.shape(value):
        return set()
    return set().union(*map(_arrays_of, value.operands)) if isinstance(value, Lazy) else {id(value)}


def _plain_elementwise(
    scalars: Array,
    *arrays: Array,
    code: tuple[int, ...],
    results: tuple[int, ...],
    items: int,
    aliases: tuple[tuple[int, int], ...],
    shapes: Any,
) -> list[Array]:
    """Runs the program for each item in plain JAX."""
    count, targets = len(arrays) // items, {out: x for x, out in aliases}
    outputs: list[Array] = []
    for start in range(0, len(arrays), count):
        own = arrays[start : start + count]
        shape = min((array.shape for array in own), key=math.prod)
        registers = [array if array.shape == shape else array[: shape[0]] for array in own]
        registers += [jnp.broadcast_to(scalar, shape) for scalar in scalars]
        for at in range(0, len(code), 4):
            operands = [registers[number] for number in code[at + 1 : at + 4]]
            if _NAMES[code[at]] == "select_n":
                registers.append(jnp.where(operands[0] != 0, operands[2], operands[1]))
            else:
                registers.append(getattr(lax, _NAMES[code[at]])(*operands[: _OPERANDS[code[at]]]))
        for register in results:
            result, whole = registers[register], shapes[len(outputs)]
            if whole != shape:
                result = lax.dynamic_update_slice_in_dim(arrays[targets[len(outputs)] - 1], result, 0, axis=0)
            outputs.append(result)
    return outputs


def _lower(ctx: Any, *operands: Any, code: Any, results: Any, items: int, aliases: Any, shapes: Any) -> Any:
    arrays = {"code": np.array(code, np.int64), "results": np.array(results, np.int64)}
    return call_kernel("elementwise", ctx, *operands, in_place=dict(aliases), items=items, **arrays)


_elementwise_p = define(
    "elementwise",
    _plain_elementwise,
    _lower,
    multiple_results=True,
    shapes=lambda *_, shapes, **params: shapes,
)
_square_sums_p = define(
    "square_sums",
    lambda *arrays: jnp.stack([jnp.sum(jnp.square(array)) for array in arrays]),
    shapes=lambda *arrays: [(len(arrays),)],
)
_tail_p = define(
    "tail",
    lambda vector, *, size: vector[vector.shape[0] - size :],
    lambda ctx, vector, *, size: call_kernel("tail", ctx, vector),
)
_number_p = define("number", lambda *, number: jnp.int32(number))
