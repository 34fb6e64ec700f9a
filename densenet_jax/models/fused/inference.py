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
from densenet_jax.kernels.cpu import bfloat16, int8
from densenet_jax.kernels.cpu import block as cpu
from densenet_jax.kernels.cpu.convolution import convolve_fast
from densenet_jax.kernels.cpu.library import bfloat16_products, int8_products
from densenet_jax.kernels.cpu.primitive import DTYPES, is_available
from densenet_jax.models.densenet import BlockOptions, DenseLayer
from densenet_jax.models.dual_path import DualPathBlock
from densenet_jax.models.fold import fold_batch_norm
from densenet_jax.models.layers import BatchNorm, Convolution

logger = logging.getLogger(__name__)
_SCALES = "kernel_scales"  # collection of variables: of each output of an int8 kernel
# What the evaluate_* functions below hand to the kernels, and nothing else: no other convolution reads their layout.
_KERNEL = re.compile(
    r"denseblock\d+/denselayer\d+/conv\d/kernel|transition\d+/conv/kernel"  # densenet.py
    r"|conv\d+_\d+/c(1x1|3x3)_\w+(/conv)?/kernel"  # dual_path.py, but for its stem, conv1_1/conv
)


def prepare_inference(
    module: nn.Module, variables: dict[str, Any], devices: int = 1
) -> tuple[nn.Module, dict[str, Any]]:
    """Folds batch norms and packs kernels once, before many calls; the outputs are the same up to rounding.

    Without CPU kernels for the network, both are as they were. A call takes half as many arrays afterwards: for a
    network of two milliseconds a tenth of the time.
    """
    if _is_fit(module, devices) and getattr(module, "param_dtype", None) == jnp.float32:
        module, variables = fold_batch_norm(module, variables)
    return pack_kernels(module, variables, devices)


def _is_fit(module: Any, devices: int) -> bool:
    implementation = getattr(module, "implementation", None)
    return getattr(implementation, "evaluates_by_cpu_kernels", False) and is_available() and devices == 1


def pack_kernels(module: nn.Module, variables: dict[str, Any], devices: int = 1) -> tuple[nn.Module, dict[str, Any]]:
    """Lays the kernels of blocks out as the CPU kernels read them, once instead of in every call.

    Returns a network for evaluation in this process and its variables, of the given shapes: the same function to the
    bit. Without CPU kernels for it, both are as they were. A network in bfloat16 gets feature maps in float32; products
    are of values rounded to bfloat16 if the processor has an instruction for that, and are summed in float32. One in
    int8 likewise: products are of integers, and of bfloat16 values in the stem.
    """
    implementation: Any = getattr(module, "implementation", None)
    wants_int8 = getattr(implementation, "int8", False)
    is_fit = _is_fit(module, devices)
    if wants_int8 and not (is_fit and int8_products()):
        why = "this processor multiplies no integers of 8 bits (it has no AMX or AVX512-VNNI)"
        why = why if is_fit else "only the CPU kernels have it, on one device (docs/predict.md)"
        logger.warning("config.model.dtype=int8: %s, so predictions are computed in float32.", why)
    if not is_fit:
        return module, variables
    by_int8 = wants_int8 and bool(int8_products())
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
    rounds, scales = rounds or (by_int8 and bool(bfloat16_products())), dict[str, Any]()
    in_program = any(isinstance(kernel, jax.core.Tracer) for kernel in params.values())
    for name, kernel in params.items():
        groups = kernel.shape[3] // kernel.shape[2] if name.endswith("c3x3_b/conv/kernel") else 1
        is_blurred = name.startswith("transition") and module.architecture.blur == "all"  # by XLA
        if not _KERNEL.fullmatch(name) or is_blurred:
            continue
        is_plain = "c3x3" not in name  # which may have a stride
        if by_int8 and int8.is_packable(kernel, groups) and is_plain:
            packed = int8.pack(kernel if in_program else np.asarray(kernel))
            params[name], scales[name] = packed
        elif rounds and bfloat16.is_packable(kernel, groups) and is_plain:
            params[name] = bfloat16.pack(kernel if in_program else np.asarray(kernel))
        elif not in_program and cpu.is_packable(kernel, groups):
            params[name] = cpu.pack(kernel, groups)
    if not in_program:
        params, scales = jax.device_put((params, scales))  # `jnp.asarray` would compile a program for every shape
    changes = {"is_packed": not in_program, "rounds": rounds}
    module = module.clone(implementation=dataclasses.replace(implementation, **changes))
    collections = {"params": params} | ({_SCALES: scales} if scales else {})
    nested = {name: traverse_util.unflatten_dict(own, sep="/") for name, own in collections.items()}
    return module, {**variables, **nested}


@dataclasses.dataclass(frozen=True)
class PackedInCall:
    """Evaluates the network that `pack_kernels` makes in each call, for variables that change between calls."""

    module: Any
    devices: int = 1

    def apply(self, variables: dict[str, Any], images: Array, *, train: bool) -> Array:
        """Computes the network's logits in evaluation."""
        module: Any
        module, variables = pack_kernels(self.module, variables, self.devices)
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
        norm, last = layer.norm1, layer.conv1
        if layer.bottleneck_width:
            bottleneck = last.kernel.shape[-1]
            steps.append(cpu.Step(1, 2, packed=is_packed and cpu.is_packable(last.kernel)))
            arrays.append(_arrays(norm, last, options.dtype))
            norm, last = layer.norm2, layer.conv2
        packed = is_packed and cpu.is_packable(last.kernel)
        steps.append(cpu.Step(2 if layer.bottleneck_width else 1, 1, offset=width, packed=packed))
        arrays.append(_arrays(norm, last, options.dtype))
        width += last.kernel.shape[-1]
    shapes = [(*x.shape[:3], width), (*x.shape[:3], bottleneck)][: 2 if bottleneck else 1]
    return _run(_Plan(tuple(steps), tuple(shapes), options.norm.epsilon, x.shape[-1]), x, arrays)


def evaluate_stem(
    norm: BatchNorm, convolution: Convolution, x: Float[Array, "b h w c"]
) -> Float[Array, "b h2 w2 c2"] | None:
    """Computes the stem's convolution, norm, ReLU and maximum by bfloat16 products; None where the kernels can't."""
    x, kernel = x.astype(convolution.dtype), convolution.kernel.astype(convolution.dtype)
    if not bfloat16.is_stem(x, kernel):
        return None
    scale, bias = cpu.fold_norm(_arrays(norm, convolution, convolution.dtype), norm.options.epsilon)
    return bfloat16.stem(convolution.stride, x, kernel, scale, bias)


def evaluate_transition(
    norm: BatchNorm, convolution: Convolution, x: Float[Array, "b h w c"], *, is_packed: bool
) -> Float[Array, "b h2 w2 c2"] | None:
    """Computes `densenet.Plain.transition` without blur in evaluation; None where the kernels can't."""
    kernel, (batch, *sides) = convolution.kernel, x.shape[:3]
    step = cpu.Step(0, 1, stride=2, packed=is_packed and cpu.is_packable(kernel), pooled=True)
    shape = (batch, *(side // 2 for side in sides), kernel.shape[-1])
    plan = _Plan((step,), (shape,), norm.options.epsilon)
    return _run(plan, x.astype(convolution.dtype), [_arrays(norm, convolution, convolution.dtype)])


def evaluate_stage(
    blocks: Sequence[DualPathBlock], x: Float[Array, "b h w c"], *, is_packed: bool
) -> Float[Array, "b h2 w2 c2"] | None:
    """Computes `dual_path.Plain.stage` in evaluation; None where the kernels don't support the operands."""
    steps, arrays, (first, dtype) = list[cpu.Step](), list[cpu.Arrays](), (blocks[0], blocks[0].dtype)
    residual, new, stride, x = first.residual_width, first.dense_increment, first.stride, x.astype(dtype)
    projection = first.projection()
    if projection is None:
        return None

    def add(norm: BatchNorm, convolution: Convolution, step: cpu.Step) -> None:
        steps.append(step._replace(packed=is_packed and cpu.is_packable(convolution.kernel, step.groups)))
        arrays.append(_arrays(norm, convolution, dtype))

    add(projection.bn, projection.conv, cpu.Step(0, 1, stride=stride))
    width = projection.conv.kernel.shape[-1]
    for index, block in enumerate(blocks):
        inner = 4 if index and stride > 1 else 2  # at stride 1 one map does for all blocks
        add(block.c1x1_a.bn, block.c1x1_a.conv, cpu.Step(1 if index else 0, inner))
        grouped = cpu.Step(inner, 3, stride=block.stride, groups=block.groups)
        add(block.c3x3_b.bn, block.c3x3_b.conv, grouped)
        if block.split_projection:
            add(block.c1x1_c.bn, block.c1x1_c1, cpu.Step(3, 1, residual, residual))
            add(block.c1x1_c.bn, block.c1x1_c2, cpu.Step(3, 1, width))
        else:
            add(block.c1x1_c.bn, block.c1x1_c.conv, cpu.Step(3, 1, width, residual))
        width += new
    batch, *sides = x.shape[:3]
    after = [(side - 1) // stride + 1 for side in sides]
    shapes = ((batch, *after, width), (batch, *sides, first.width), (batch, *after, first.width))
    others = shapes[-1:] if stride > 1 else ()
    return _run(_Plan(tuple(steps), (*shapes, *others), first.norm_options.epsilon), x, arrays)


def _arrays(norm: BatchNorm, convolution: Convolution, dtype: DType) -> cpu.Arrays:
    empty, kernel = jnp.zeros((0,), dtype), convolution.kernel
    if norm.options.folded:
        own = (empty if norm.after_convolution else norm.scale, norm.bias, empty, empty, kernel)
    else:
        own = (norm.scale, norm.bias, norm.mean.value, norm.var.value, kernel)
    is_rounded = kernel.dtype in (jnp.bfloat16, jnp.int8) and kernel.dtype != norm.bias.dtype  # by `pack_kernels`
    arrays = cpu.Arrays(*(array.astype(dtype) for array in own))
    if not is_rounded:
        return arrays
    return arrays._replace(kernel=kernel, kernel_scales=convolution.get_variable(_SCALES, "kernel", empty))


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
