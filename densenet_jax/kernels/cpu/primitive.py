"""Operations that XLA's CPU backend leaves to the compiled library, and every other backend compiles as ever.

The choice falls when a program is compiled, for the platform and the devices it is compiled for: the library for a
program of one CPU device; the plain twin for any other platform, for programs over many devices (whose partitioner
could not see into a call) and for exported programs.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

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
    sizes = (size for array in arrays for size in array.shape)
    return arrays[0].dtype in DTYPES and {a.dtype for a in arrays} == {arrays[0].dtype} and all(map(_is_static, sizes))


def _is_static(size: Any) -> bool:
    return isinstance(size, int) and size > 0


def define(
    name: str, twin: Callable[..., Any], lowering: Callable[..., Any], multiple_results: bool = False
) -> Primitive:
    """A primitive with the shapes and results of its twin, a function of arrays and static keywords.

    Args:
      name: of the primitive.
      twin: what it computes, in plain JAX.
      lowering: a lowering rule that calls the library, or gives None where the twin is to be compiled.
      multiple_results: the twin gives a tuple.
    """
    primitive = Primitive(f"densenet_{name}")
    primitive.multiple_results = multiple_results

    @functools.cache
    def compiled(**params: Any) -> Callable[..., Any]:
        return jax.jit(functools.partial(primitive.bind, **params))

    primitive.def_impl(lambda *operands, **params: compiled(**params)(*operands))

    @primitive.def_abstract_eval
    def _(*operands: Any, **params: Any) -> Any:
        found = jax.eval_shape(functools.partial(twin, **params), *operands)
        return jax.tree.map(lambda shape: jax.core.ShapedArray(shape.shape, shape.dtype), found)

    lower_twin = mlir.lower_fun(twin, multiple_results=multiple_results)

    def lower_on_cpu(ctx: Any, *operands: Any, **params: Any) -> Any:
        if _for_one_device(ctx.module_context) and target_names():
            found = lowering(ctx, *operands, **params)
            if found is not None:
                return found
        return lower_twin(ctx, *operands, **params)

    mlir.register_lowering(primitive, lower_twin)
    mlir.register_lowering(primitive, lower_on_cpu, platform="cpu")

    def batch(operands: Any, dims: Any, **params: Any) -> Any:
        found = jax.vmap(functools.partial(twin, **params), in_axes=dims)(*operands)
        return found, jax.tree.map(lambda _: 0, found)

    batching.primitive_batchers[primitive] = batch
    return primitive


def _for_one_device(context: Any) -> bool:
    """Whether a program is compiled to run here on one device; unknown is no."""
    exported = getattr(context.lowering_parameters, "for_export", True)
    return not exported and getattr(context.axis_context, "num_devices", 0) == 1
