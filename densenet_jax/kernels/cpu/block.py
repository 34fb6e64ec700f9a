"""The convolutions of a whole block in one call, for inference.

Between calls of one kernel after another, threads fall asleep and XLA copies, adds and folds norms. In one call they
stay awake, outputs are added and appended where they lie, and groups are convolved without products with zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Float

from densenet_jax.kernels.cpu import bfloat16, int8
from densenet_jax.kernels.cpu.convolution import plain_convolve
from densenet_jax.kernels.cpu.library import bfloat16_products, int8_products, vector_bytes
from densenet_jax.kernels.cpu.primitive import are_known, call_kernel, define, is_available


class Step(NamedTuple):
    """One convolution of relu(norm(x)) among those of a block; feature map 0 is its input, the others are results.

    Attributes:
        source, target: feature maps that are read, from the first channel on, and written.
        offset: the target's first channel that is written.
        added: how many outputs are added to the target's first channels, before the others are written.
        packed: the kernel is as `pack` lays it out.
        pooled: reads means of 2x2 pixels of relu(norm(x)), by a 1x1 kernel at stride 2.
    """

    source: int
    target: int
    offset: int = 0
    added: int = 0
    stride: int = 1
    groups: int = 1
    packed: bool = False
    pooled: bool = False


_NO_SCALES: Any = np.zeros(0, np.float32)


class Arrays(NamedTuple):
    """Operands of a step: a norm with running statistics, or folded, without these (and without a scale); a kernel.

    A bfloat16 or int8 kernel beside float32 operands is as `bfloat16.pack` or `int8.pack` lays it out, and multiplies
    rounded inputs; an int8 one has `kernel_scales`.
    """

    scale: Array
    bias: Array
    mean: Array
    var: Array
    kernel: Array
    kernel_scales: Array = _NO_SCALES


def is_usable(x: Array, arrays: Sequence[Arrays]) -> bool:
    """Whether the kernels are available and support these operands."""
    operands = [array for own in arrays for array in own if array.size]
    if x.dtype == jnp.float32:
        operands = [array for array in operands if not _is_rounded(array)]
    return is_available() and are_known(x, *operands)


def run_block(
    x: Float[Array, "b h w c"],
    arrays: Sequence[Arrays],
    *,
    steps: Sequence[Step],
    shapes: Sequence[tuple[int, ...]],
    epsilon: float,
    copied: int = 0,
) -> Float[Array, "b h2 w2 c2"]:
    """Computes steps one after another and returns the first result, of `shapes[0]`; the others are for steps only.

    The first `copied` channels of x are copied to the first result before.
    """
    operands = [array for own in arrays for array in own]
    return _block_p.bind(x, *operands, steps=tuple(steps), shapes=tuple(shapes), epsilon=epsilon, copied=copied)[0]


def _is_rounded(array: Any) -> bool:
    return array.ndim == 4 and array.dtype in (jnp.bfloat16, jnp.int8)


def fold_norm(own: Arrays, epsilon: float) -> tuple[Array, Array]:
    """Returns the scale and bias of a norm by its running statistics."""
    scale = own.scale if own.scale.size else jnp.ones_like(own.bias)
    if not own.mean.size:
        return scale, own.bias
    scale = scale * lax.rsqrt(own.var + epsilon)
    return scale, own.bias - own.mean * scale


def plain_run_block(
    x: Array,
    *operands: Array,
    steps: tuple[Step, ...],
    shapes: tuple[tuple[int, ...], ...],
    epsilon: float,
    copied: int,
    convolve: Callable[..., Array] = plain_convolve,
) -> list[Array]:
    """Computes all results of `run_block` in plain JAX, by `plain_convolve` or a function like it."""
    maps = [x, *(jnp.zeros(shape, x.dtype) for shape in shapes)]
    if copied:
        maps[1] = lax.dynamic_update_slice_in_dim(maps[1], x[..., :copied], 0, axis=3)
    for index, step in enumerate(steps):
        count = len(Arrays._fields)
        own = Arrays(*operands[count * index : count * (index + 1)])
        scale, bias = (vector[None, None, None, :] for vector in fold_norm(own, epsilon))
        activation = jax.nn.relu(maps[step.source][..., : bias.size] * scale + bias)
        kernel, stride = unpack(own.kernel, step.groups) if step.packed else own.kernel, step.stride
        if step.pooled:
            activation, stride = nn.avg_pool(activation, (2, 2), (2, 2)), 1
        if kernel.dtype == jnp.int8:
            kernel, activation = int8.unpack(kernel, own.kernel_scales), int8.round_inputs(activation, kernel.shape[0])
        elif _is_rounded(kernel):
            kernel = bfloat16.unpack(kernel).astype(x.dtype)
            activation = activation.astype(jnp.bfloat16).astype(x.dtype)
        y = convolve(activation, kernel, stride=stride, padding=kernel.shape[0] // 2, groups=step.groups)
        target = maps[step.target]
        target = target.at[..., : step.added].add(y[..., : step.added])
        maps[step.target] = lax.dynamic_update_slice_in_dim(target, y[..., step.added :], step.offset, axis=3)
    return maps[1:]


def _lower(ctx: Any, *operands: Any, steps: tuple[Step, ...], copied: int, epsilon: float, **_: Any) -> Any:
    fields = np.array(steps, np.int64).ravel()
    products = int8_products() if any(aval.dtype == jnp.int8 for aval in ctx.avals_in) else bfloat16_products()
    return call_kernel("block", ctx, *operands, steps=fields, copied=copied, epsilon=float(epsilon), products=products)


def is_packable(kernel: Any, groups: int = 1) -> bool:
    """Whether `pack` keeps the kernel's shape: what a tile of outputs reads are whole vectors."""
    lanes, outputs = vector_bytes() // kernel.dtype.itemsize, kernel.shape[-1] // groups
    together = _groups_of_a_vector(kernel, groups)
    return kernel.dtype in (np.float32, np.float64) and outputs * together % lanes == 0 and groups % together == 0


def _groups_of_a_vector(kernel: Any, groups: int) -> int:
    """Returns how many groups the kernels convolve at once (Grouping in native/block.h): those that fill a vector."""
    size, _, inputs, outputs = kernel.shape
    lanes = vector_bytes() // kernel.dtype.itemsize
    is_square = outputs == groups * inputs and inputs <= lanes // 2
    return lanes // inputs if groups > 1 and size == 3 and kernel.dtype == np.float32 and is_square else 1


def _order(kernel: Any, groups: int) -> np.ndarray:
    """Returns the packed order of a kernel's values: for two vectors of outputs at a time all that they need."""
    size, _, inputs, outputs = kernel.shape
    numbers = np.arange(size * size * inputs * outputs)
    together = _groups_of_a_vector(kernel, groups)
    if together > 1:
        return numbers.reshape(size, size, inputs, groups // together, -1).transpose(3, 0, 2, 1, 4).ravel()
    width = 2 * vector_bytes() // kernel.dtype.itemsize
    own = numbers.reshape(-1, groups, outputs // groups).transpose(1, 0, 2)
    return np.concatenate([group[:, i : i + width].ravel() for group in own for i in range(0, group.shape[1], width)])


def pack(kernel: Any, groups: int = 1) -> np.ndarray:
    """Lays a kernel for which `is_packable` out as the kernels read it, in the same shape."""
    kernel = np.asarray(kernel)
    return kernel.ravel()[_order(kernel, groups)].reshape(kernel.shape)


def unpack(kernel: Array, groups: int = 1) -> Array:
    """Undoes `pack`."""
    return kernel.ravel()[np.argsort(_order(kernel, groups))].reshape(kernel.shape)


_block_p = define(
    "block",
    plain_run_block,
    _lower,
    multiple_results=True,
    shapes=lambda *_, shapes, **__: shapes,
)
