"""Blocks in evaluation on a CPU: one call of the compiled kernels computes a whole dense block or stage."""

from __future__ import annotations

import dataclasses
import functools
import logging
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util
from jaxtyping import Array, Float

from densenet_jax.dtypes import DType
from densenet_jax.kernels.cpu import bfloat16
from densenet_jax.kernels.cpu import block as cpu
from densenet_jax.kernels.cpu.convolution import convolve_fast
from densenet_jax.kernels.cpu.library import bfloat16_products
from densenet_jax.kernels.cpu.primitive import DTYPES, is_available
from densenet_jax.models.densenet import BlockOptions, DenseLayer
from densenet_jax.models.dual_path import DualPathBlock
from densenet_jax.models.layers import BatchNorm, Convolution

logger = logging.getLogger(__name__)
_KERNEL = re.compile(r"denseblock\d+/denselayer\d+/conv\d/kernel|transition\d+/conv/kernel|conv\d_\d+/c.*/kernel")


def pack_kernels(module: nn.Module, variables: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """Lays the kernels of blocks out as the CPU kernels read them, once instead of in every call.

    Returns a network for evaluation in this process and its variables, of the given shapes: the same function to the
    bit. Without CPU kernels for it, both are as they were. A network in bfloat16 gets feature maps in float32; products
    are of values rounded to bfloat16 if the processor has an instruction for that, and are summed in float32.
    """
    implementation: Any = getattr(module, "implementation", None)
    if not getattr(implementation, "evaluates_by_cpu_kernels", False) or not is_available():
        return module, variables
    rounds = module.dtype == jnp.bfloat16 and module.param_dtype == jnp.float32
    if rounds:
        head = dataclasses.replace(module.head_options, dtype=jnp.float32)
        module, rounds = module.clone(dtype=jnp.float32, head_options=head), bool(bfloat16_products())
        if not rounds:
            logger.warning(
                "config.model.dtype=bfloat16: this processor multiplies no bfloat16 values (it has no AMX or "
                "AVX512-BF16), so predictions are computed in float32."
            )
    if module.dtype != module.param_dtype or module.dtype not in DTYPES:
        return module, variables
    params = traverse_util.flatten_dict(dict(variables["params"]), sep="/")
    in_program = any(isinstance(kernel, jax.core.Tracer) for kernel in params.values())
    for name, kernel in params.items():
        groups = kernel.shape[3] // kernel.shape[2] if name.endswith("c3x3_b/conv/kernel") else 1
        is_blurred = name.startswith("transition") and module.architecture.blur == "all"  # by XLA
        if not _KERNEL.fullmatch(name) or is_blurred:
            continue
        if rounds and bfloat16.is_packable(kernel, groups) and "c3x3" not in name:  # which may have a stride
            params[name] = jnp.asarray(bfloat16.pack(kernel if in_program else np.asarray(kernel)))
        elif not in_program and cpu.is_packable(kernel, groups):
            params[name] = jnp.asarray(cpu.pack(kernel, groups))
    changes = {"is_packed": not in_program, "rounds": rounds}
    packed = module.clone(implementation=dataclasses.replace(implementation, **changes))
    return packed, {**variables, "params": traverse_util.unflatten_dict(params, sep="/")}


@dataclasses.dataclass(frozen=True)
class PackedInCall:
    """Evaluates the network that `pack_kernels` makes in each call, for variables that change between calls."""

    module: Any

    def apply(self, variables: dict[str, Any], images: Array, *, train: bool) -> Array:
        """Computes the network's logits in evaluation."""
        module: Any
        module, variables = pack_kernels(self.module, variables)
        return module.apply(variables, images, train=train)


class _Plan(NamedTuple):
    """Static arguments of `kernels.cpu.block.run_block`."""

    steps: tuple[cpu.Step, ...]
    shapes: tuple[tuple[int, ...], ...]
    epsilon: float
    copied: int = 0


def evaluate_dense_block(
    layers: Sequence[DenseLayer], x: Float[Array, "b h w c"], options: BlockOptions, *, is_packed: bool
) -> Float[Array, "b h w c2"] | None:
    """Computes `densenet.Plain.dense_block` in evaluation; None where the kernels don't support the operands."""
    x, steps, arrays = x.astype(options.dtype), list[cpu.Step](), list[cpu.Arrays]()
    width, bottleneck = x.shape[-1], 0
    for layer in layers:
        first, second = (
            (layer.conv1.kernel, layer.conv2.kernel) if layer.bottleneck_width else (None, layer.conv1.kernel)
        )
        if first is not None:
            bottleneck = first.shape[-1]
            steps.append(cpu.Step(1, 2, packed=is_packed and cpu.is_packable(first)))
            arrays.append(_arrays(layer.norm1, first, options.dtype))
        packed = is_packed and cpu.is_packable(second)
        steps.append(cpu.Step(1 if first is None else 2, 1, offset=width, packed=packed))
        arrays.append(_arrays(layer.norm1 if first is None else layer.norm2, second, options.dtype))
        width += second.shape[-1]
    shapes = [(*x.shape[:3], width), (*x.shape[:3], bottleneck)][: 2 if bottleneck else 1]
    return _run(_Plan(tuple(steps), tuple(shapes), options.norm.epsilon, x.shape[-1]), x, arrays)


def evaluate_stem(
    norm: BatchNorm, convolution: Convolution, x: Float[Array, "b h w c"]
) -> Float[Array, "b h2 w2 c2"] | None:
    """Computes the stem's convolution, norm, ReLU and maximum by bfloat16 products; None where the kernels can't."""
    x, kernel = x.astype(convolution.dtype), convolution.kernel.astype(convolution.dtype)
    if not bfloat16.is_stem(x, kernel):
        return None
    scale, bias = cpu.fold_norm(_arrays(norm, kernel, convolution.dtype), norm.options.epsilon)
    return bfloat16.stem(convolution.stride, x, kernel, scale, bias)


def evaluate_transition(
    norm: BatchNorm, convolution: Convolution, x: Float[Array, "b h w c"], *, is_packed: bool
) -> Float[Array, "b h2 w2 c2"] | None:
    """Computes `densenet.Plain.transition` without blur in evaluation; None where the kernels can't."""
    kernel, (batch, *sides) = convolution.kernel, x.shape[:3]
    step = cpu.Step(0, 1, stride=2, packed=is_packed and cpu.is_packable(kernel), pooled=True)
    shape = (batch, *(side // 2 for side in sides), kernel.shape[-1])
    plan = _Plan((step,), (shape,), norm.options.epsilon)
    return _run(plan, x.astype(convolution.dtype), [_arrays(norm, kernel, convolution.dtype)])


def evaluate_stage(
    blocks: Sequence[DualPathBlock], x: Float[Array, "b h w c"], *, is_packed: bool
) -> Float[Array, "b h2 w2 c2"] | None:
    """Computes `dual_path.Plain.stage` in evaluation; None where the kernels don't support the operands."""
    steps, arrays, (first, dtype) = list[cpu.Step](), list[cpu.Arrays](), (blocks[0], blocks[0].dtype)
    residual, new, stride, x = first.residual_width, first.dense_increment, first.stride, x.astype(dtype)
    projection = first.projection()
    if projection is None:
        return None

    def add(norm: BatchNorm, kernel: Array, step: cpu.Step) -> None:
        steps.append(step._replace(packed=is_packed and cpu.is_packable(kernel, step.groups)))
        arrays.append(_arrays(norm, kernel, dtype))

    add(projection.bn, projection.conv.kernel, cpu.Step(0, 1, stride=stride))
    width = projection.conv.kernel.shape[-1]
    for index, block in enumerate(blocks):
        inner = 4 if index and stride > 1 else 2  # at stride 1 one map does for all blocks
        add(block.c1x1_a.bn, block.c1x1_a.conv.kernel, cpu.Step(1 if index else 0, inner))
        grouped = cpu.Step(inner, 3, stride=block.stride, groups=block.groups)
        add(block.c3x3_b.bn, block.c3x3_b.conv.kernel, grouped)
        if block.split_projection:
            add(block.c1x1_c.bn, block.c1x1_c1.kernel, cpu.Step(3, 1, residual, residual))
            add(block.c1x1_c.bn, block.c1x1_c2.kernel, cpu.Step(3, 1, width))
        else:
            add(block.c1x1_c.bn, block.c1x1_c.conv.kernel, cpu.Step(3, 1, width, residual))
        width += new
    batch, *sides = x.shape[:3]
    after = [(side - 1) // stride + 1 for side in sides]
    shapes = ((batch, *after, width), (batch, *sides, first.width), (batch, *after, first.width))
    others = shapes[-1:] if stride > 1 else ()
    return _run(_Plan(tuple(steps), (*shapes, *others), first.norm_options.epsilon), x, arrays)


def _arrays(norm: BatchNorm, kernel: Array, dtype: DType) -> cpu.Arrays:
    empty = jnp.zeros((0,), dtype)
    if norm.options.folded:
        own = (empty if norm.after_convolution else norm.scale, norm.bias, empty, empty, kernel)
    else:
        own = (norm.scale, norm.bias, norm.mean.value, norm.var.value, kernel)
    is_rounded = kernel.dtype == jnp.bfloat16 != norm.bias.dtype  # by `pack_kernels`
    arrays = cpu.Arrays(*(array.astype(dtype) for array in own))
    return arrays._replace(kernel=kernel) if is_rounded else arrays


def _run(plan: _Plan, x: Array, arrays: Sequence[cpu.Arrays]) -> Array | None:
    if cpu.is_usable(x, arrays):
        return _evaluate(plan, x, tuple(arrays))
    is_packed = any(step.packed or own.kernel.dtype != x.dtype for step, own in zip(plan.steps, arrays, strict=True))
    assert not is_packed, "kernels are laid out for CPU kernels that can't be used here"
    return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _evaluate(plan: _Plan, x: Array, arrays: tuple[cpu.Arrays, ...]) -> Array:
    return cpu.run_block(x, arrays, **plan._asdict())


def _forward(plan: _Plan, x: Array, arrays: tuple[cpu.Arrays, ...]) -> tuple[Array, Any]:
    def run(x: Array, arrays: tuple[cpu.Arrays, ...]) -> Array:
        operands = [array for own in arrays for array in own]
        return cpu.plain_run_block(x, *operands, convolve=convolve_fast, **plan._asdict())[0]

    return jax.vjp(run, x, arrays)


def _backward(plan: _Plan, pullback: Any, gradient: Array) -> tuple[Any, Any]:
    del plan
    return pullback(gradient)


_evaluate.defvjp(_forward, _backward)
