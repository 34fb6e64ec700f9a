"""Defines operations with a compiled kernel on XLA's CPU backend and plain JAX elsewhere."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive

from densenet_jax.kernels import dispatch
from densenet_jax.kernels.cpu.library import target_names

DTYPES = (jnp.float32, jnp.float64)
_wanted = jax.make_user_context(True)  # JAX caches traces for each value


def is_available() -> bool:
    """Whether this process runs on CPUs, has the kernels and is not inside `plain_kernels`."""
    return not is_plain() and jax.default_backend() == "cpu" and bool(target_names())


def is_plain() -> bool:
    """Whether this is inside `plain_kernels`."""
    return not _wanted.value


@contextlib.contextmanager
def plain_kernels() -> Iterator[None]:
    """Traces without our primitives, for converters that read programs primitive by primitive."""
    with _wanted(False):
        yield


def are_known(*arrays: Any) -> bool:
    """Whether arrays have one dtype that the kernels support, and static sizes above 0."""
    dtype = arrays[0].dtype
    return dtype in DTYPES and {a.dtype for a in arrays} == {dtype} and have_static_sizes(*arrays)


def have_static_sizes(*arrays: Any) -> bool:
    """Whether all sizes of arrays are static and above 0."""
    return all(isinstance(side, int) and side > 0 for array in arrays for side in array.shape)


def call_kernel(call: str, ctx: Any, *operands: Any, in_place: bool | dict[int, int] = False, **attributes: Any) -> Any:
    """Lowers to a kernel of `library` with bool, integer, float or array attributes.

    in_place: the result in the memory of each of these operands; True is {0: 0}.
    """
    aliases = {0: 0} if in_place is True else in_place or None
    rule = jax.ffi.ffi_lowering(target_names()[call], operand_output_aliases=aliases)
    kinds: dict[type, Any] = {bool: bool, float: np.float64, np.ndarray: np.asarray}
    return rule(ctx, *operands, **{key: kinds.get(type(v), np.int64)(v) for key, v in attributes.items()})


def define(
    name: str,
    reference: Callable[..., Any],
    lowering: Callable[..., Any] | None = None,
    *,
    multiple_results: bool = False,
    shapes: Callable[..., Any] | None = None,
) -> Primitive:
    """Makes a primitive with a kernel for programs of one CPU device; lowering and shapes as for `dispatch.define`.

    Without a lowering, the kernel of that name gets all operands and parameters as they are.
    """
    own = lowering or functools.partial(call_kernel, name)

    def lower(ctx: Any, *operands: Any, **params: Any) -> Any:
        return own(ctx, *operands, **params) if target_names() else None

    return dispatch.define(name, reference, lower, platform="cpu", multiple_results=multiple_results, shapes=shapes)
