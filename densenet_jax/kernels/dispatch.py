"""Operations with a plain twin, which one platform leaves to a kernel and every other compiles as ever.

The choice falls when a program is compiled, for the platform and the devices it is compiled for: the kernel for a
program of one device of its platform, or for what each of many does by itself (`jax.shard_map`); the twin for any
other platform, for other programs over many devices (whose
partitioner could not see into a call) and for exported programs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir


def define(
    name: str,
    twin: Callable[..., Any],
    lowering: Callable[..., Any],
    *,
    platform: str,
    multiple_results: bool = False,
) -> Primitive:
    """A primitive with the shapes and results of its twin, a function of arrays and static keywords.

    Args:
      name: of the primitive.
      twin: what it computes, in plain JAX.
      lowering: a lowering rule that calls the kernel, or gives None where the twin is to be compiled.
      platform: the one that has the kernel, "cpu" or "cuda".
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

    def lower_kernel(ctx: Any, *operands: Any, **params: Any) -> Any:
        if is_for_one_device(ctx.module_context):
            found = lowering(ctx, *operands, **params)
            if found is not None:
                return found
        return lower_twin(ctx, *operands, **params)

    mlir.register_lowering(primitive, lower_twin)
    mlir.register_lowering(primitive, lower_kernel, platform=platform)

    def batch(operands: Any, dims: Any, **params: Any) -> Any:
        found = jax.vmap(functools.partial(twin, **params), in_axes=dims)(*operands)
        return found, jax.tree.map(lambda _: 0, found)

    batching.primitive_batchers[primitive] = batch
    return primitive


def is_for_one_device(context: Any) -> bool:
    """Whether a program is compiled to run on one device, or on each of many by itself; unknown is no."""
    exported = getattr(context.lowering_parameters, "for_export", True)
    where = context.axis_context
    alone = getattr(where, "num_devices", 0) == 1
    if hasattr(where, "manual_axes"):
        alone = where.manual_axes == frozenset(where.mesh.axis_names)
    return not exported and alone
