"""Defines operations that have a kernel on one platform and run in plain JAX on all others.

The choice is made when a program is compiled. The kernel serves programs for one device of its platform and bodies of
`jax.shard_map`. The reference serves other platforms, other programs over several devices (whose partitioner can't see
into a kernel) and exported programs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jaxtyping import Array


def define(
    name: str,
    reference: Callable[..., Any],
    lowering: Callable[..., Any],
    *,
    platform: str,
    multiple_results: bool = False,
    shapes: Callable[..., Any] | None = None,
) -> Primitive:
    """Makes a primitive with the shapes and results of its reference, a function of arrays and static keywords.

    lowering is a lowering rule that calls the kernel of platform ("cpu", "cuda" or "tpu"), or returns None for the
    reference. shapes returns the shapes of the results, of the first operand's dtype, without tracing the reference,
    which takes a third of the time of tracing a network.
    """
    primitive = Primitive(f"densenet_{name}")
    primitive.multiple_results = multiple_results

    @functools.cache
    def compiled(**params: Any) -> Callable[..., Any]:
        return jax.jit(functools.partial(primitive.bind, **params))

    primitive.def_impl(lambda *operands, **params: compiled(**params)(*operands))

    @primitive.def_abstract_eval
    def _(*operands: Any, **params: Any) -> Any:
        if shapes is not None:
            made = [jax.core.ShapedArray(shape, operands[0].dtype) for shape in shapes(*operands, **params)]
            return made if multiple_results else made[0]
        traced = jax.eval_shape(functools.partial(reference, **params), *operands)
        return jax.tree.map(lambda shape: jax.core.ShapedArray(shape.shape, shape.dtype), traced)

    lower_reference = mlir.lower_fun(reference, multiple_results=multiple_results)

    def lower_kernel(ctx: Any, *operands: Any, **params: Any) -> Any:
        if is_for_one_device(ctx.module_context):
            results = lowering(ctx, *operands, **params)
            if results is not None:
                return results
        return lower_reference(ctx, *operands, **params)

    mlir.register_lowering(primitive, lower_reference)
    mlir.register_lowering(primitive, lower_kernel, platform=platform)

    def batch(operands: Any, dims: Any, **params: Any) -> Any:
        results = jax.vmap(functools.partial(reference, **params), in_axes=dims)(*operands)
        return results, jax.tree.map(lambda _: 0, results)

    batching.primitive_batchers[primitive] = batch
    return primitive


class PallasOperation:
    """An operation that a Pallas kernel computes on one device of its platform, and plain JAX anywhere else.

    Decorates the plain implementation, whose signature and docstring are the operation's. `define_kernel` decorates the
    function that calls the kernel: it takes the same arguments, and interpret=True to run anywhere, slowly.

    Attributes:
        reference: the plain implementation.
        kernel: the function that calls the kernel.
    """

    kernel: Callable[..., Any]

    def __init__(self, reference: Callable[..., Any]):
        functools.update_wrapper(self, reference)
        self.reference = reference

    def define_kernel(self, platform: str, supports: Callable[..., bool]) -> Callable[[Callable], Callable]:
        """Registers the kernel for a platform ("cuda" or "tpu"); supports gets the operands' shapes and dtypes."""

        def decorate(kernel: Callable[..., Any]) -> Callable[..., Any]:
            def lower(ctx: Any, *operands: Any, **params: Any) -> Any:
                if not supports(*ctx.avals_in, **params):
                    return None
                return mlir.lower_fun(kernel, multiple_results=True)(ctx, *operands, **params)

            name = self.reference.__name__
            self.kernel = kernel
            self._primitive = define(name, self.reference, lower, platform=platform, multiple_results=True)
            return kernel

        return decorate

    def __call__(self, *operands: Array, **params: Any) -> Any:
        """Computes the operation of arrays, with static keywords."""
        return tuple(self._primitive.bind(*operands, **params))

    def implementation(self, kernels: str) -> Callable[..., Any]:
        """Returns the interpreted kernel for kernels "interpret", else the operation itself."""
        return functools.partial(self.kernel, interpret=True) if kernels == "interpret" else self


def is_for_one_device(context: Any) -> bool:
    """Whether a program is for one device, or the body of a shard_map; False if that is unknown."""
    exported = getattr(context.lowering_parameters, "for_export", True)
    where = context.axis_context
    is_alone = getattr(where, "num_devices", 0) == 1
    if hasattr(where, "manual_axes"):
        is_alone = where.manual_axes == frozenset(where.mesh.axis_names)
    return not exported and is_alone
