"""Operations that XLA's CPU backend leaves to the compiled library, and every other backend compiles as ever."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive

from densenet_jax.kernels import dispatch as primitive
from densenet_jax.kernels.cpu.library import target_names

DTYPES = (jnp.float32, jnp.float64)


_wanted = jax.make_user_context(True)  # JAX keeps apart what it traced under either value


def available() -> bool:
    """Whether this process runs on CPUs, has the library and is not inside `plain_kernels`."""
    return _wanted.value and jax.default_backend() == "cpu" and bool(target_names())


@contextlib.contextmanager
def plain_kernels() -> Iterator[None]:
    """What is traced inside holds no primitive of ours, for converters that read programs primitive by primitive."""
    with _wanted(False):
        yield


def are_known(*arrays: Any) -> bool:
    """Whether arrays are of one known dtype and have static sizes above 0."""
    dtype = arrays[0].dtype
    return dtype in DTYPES and {a.dtype for a in arrays} == {dtype} and have_static_sizes(*arrays)


def have_static_sizes(*arrays: Any) -> bool:
    """Whether all sides of arrays are known and above 0."""
    return all(isinstance(side, int) and side > 0 for array in arrays for side in array.shape)


def define(
    name: str, twin: Callable[..., Any], lowering: Callable[..., Any], multiple_results: bool = False
) -> Primitive:
    """A primitive that the library computes in a program of one CPU device, and its twin anywhere else.

    Args:
      name: of the primitive.
      twin: what it computes, in plain JAX.
      lowering: a lowering rule that calls the library, or gives None where the twin is to be compiled.
      multiple_results: the twin gives a tuple.
    """

    def lower(ctx: Any, *operands: Any, **params: Any) -> Any:
        return lowering(ctx, *operands, **params) if target_names() else None

    return primitive.define(name, twin, lower, platform="cpu", multiple_results=multiple_results)
