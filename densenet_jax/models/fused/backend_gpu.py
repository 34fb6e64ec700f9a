"""The GPU backends: XLA's convolutions with one array per layer, or Pallas kernels that read the front of one buffer.

Over a mesh the kernels compute each device's own examples; sums over the batch are added up over the devices.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from densenet_jax.dtypes import DType
from densenet_jax.kernels.gpu.norm_relu_matmul import norm_relu_matmul
from densenet_jax.kernels.gpu.norm_relu_matmul_gradients import add_gradients
from densenet_jax.kernels.select import BlockShape, choose
from densenet_jax.kernels.shard import on_each_device
from densenet_jax.models.fused.backend import Backend, Buffer, take_device_share
from densenet_jax.models.fused.norm_relu_conv import (
    Gradients,
    NormReluConv,
    Operands,
    norm_relu,
    norm_relu_gradients,
)
from densenet_jax.models.fused.pooling import max_pool_gradient, max_pool_with_index
from densenet_jax.models.fused.space_to_depth import space_to_depth
from densenet_jax.models.layers import BatchStats, NormOptions, group_count


@dataclass(frozen=True)
class ConvBackend(Backend):
    """Leaves 1x1 convolutions to XLA's convolution."""

    def is_dot(self, x: Array, kernel: Array) -> bool:
        """Returns False: XLA's convolution takes every kernel."""
        return False


class ListBuffers:
    """Keeps a block's feature maps in one array per layer and concatenates them where they are read."""

    def new_buffer(self, first: Array, width: int) -> Buffer:
        """Makes a buffer that begins with the first feature maps."""
        del width
        return (first,)

    def append(self, buffer: Buffer, new: Array, start: int) -> Buffer:
        """Returns the buffer with new feature maps at its end."""
        del start
        return (*buffer, new)

    def channels(self, buffer: Buffer, start: int, end: int) -> Array:
        """Returns channels start to end, which must be whole appended pieces."""
        ends = np.cumsum([piece.shape[-1] for piece in buffer])
        first, last = (int(np.searchsorted(ends, edge, "right")) for edge in (start, end - 1))
        return jnp.concatenate(buffer[first : last + 1], axis=-1)


@dataclass(frozen=True)
class GpuBackend(ListBuffers, ConvBackend):
    """Uses XLA's operations; the stem reads four pixels at once and keeps the index of each maximum."""

    def for_block(self, shape: BlockShape, dtype: DType, group_size: int) -> Backend:
        """Returns the backend with Pallas kernels where `kernels.select` gives them or "interpret" is wanted."""
        share = take_device_share(shape, group_size, self.mesh)
        if share is None or not shape.bottleneck:
            return self
        size = (share[0].rows, shape.columns, shape.bottleneck)
        devices = None if self.mesh is None else tuple(self.mesh.devices.flat)
        if self.kernels != "interpret" and choose("gpu", dtype, size, self.kernels, devices) == "xla":
            return self
        return GpuKernelBackend(self.mesh, self.kernels)

    def convolve_stem(self, x: Array, kernel: Array, stride: int) -> Float[Array, "b h2 w2 o"]:
        """Convolves at stride 2 as an equivalent convolution at stride 1."""
        if stride == 2:
            return self.convolve(*space_to_depth(x, kernel))
        return super().convolve_stem(x, kernel, stride)

    def max_pool_forward(self, x: Array) -> tuple[Float[Array, "b h2 w2 c"], Array]:
        """Returns the maxima and their index in each window."""
        return max_pool_with_index(x)

    def max_pool_backward(self, x: Array, saved: Array, gradient: Array) -> Float[Array, "b h w c"]:
        """Spreads the gradient by the index."""
        # Four positions read each value; without the barrier XLA would recompute it for each.
        return max_pool_gradient(saved, lax.optimization_barrier(gradient), *x.shape[1:3])


@dataclass(frozen=True)
class GpuKernelBackend(ConvBackend):
    """Computes the 1x1 convolutions of dense layers with Pallas kernels."""

    def reads_buffer(self, x: Array, kernel: Array) -> bool:
        """Returns True, as the kernels read the front of the buffer."""
        return True

    def finish_buffer(self, buffer: Buffer) -> Buffer:
        """Keeps XLA from reading an earlier state of the buffer, for which it would copy the buffer."""
        return lax.optimization_barrier(buffer)

    def conv_from_buffer(
        self, buffer: Buffer, conv: NormReluConv, shift: Array | None, options: NormOptions
    ) -> tuple[Float[Array, "b h w o"], BatchStats | None]:
        """Computes the convolution and its statistics in one pass."""
        shift = jnp.zeros(conv.kernel.shape[-1], jnp.float32) if shift is None else shift
        groups = group_count(buffer.shape[0], options.group_size)
        rows = buffer.shape[0] * buffer.shape[1] * buffer.shape[2]
        multiply = norm_relu_matmul.implementation(self.kernels)
        out, sums, squares = on_each_device(
            multiply, self.mesh, groups, by_example=(True, *[False] * 4), results=("example", "group", "group")
        )(buffer.reshape(rows, -1), conv.scale, conv.bias, conv.kernel[0, 0], shift)
        mean, square = sums * (groups / rows), squares * (groups / rows)
        stats = BatchStats(mean + shift.astype(mean.dtype)[None, :], jnp.maximum(square - jnp.square(mean), 0))
        return out.reshape(*buffer.shape[:3], -1), stats

    def _second_conv_grads(self, operands: Operands, x_hat: Array, gradient: Array) -> Gradients:
        """Masks the gradient twice, for the sums and for x: XLA would store the masked gradient for both."""
        assert operands.norm is not None
        conv, groups = operands.conv, operands.norm.stats.mean.shape[0]
        grad_activation, grads = self._grads_before_relu(x_hat, conv, gradient, groups)
        grad_activation = lax.optimization_barrier(grad_activation)
        activation = norm_relu(x_hat, conv.scale, conv.bias)
        return grads._replace(x=norm_relu_gradients(grad_activation, activation, x_hat, conv.scale, groups)[0])

    def accumulate_grads(self, total: Array, operands: Operands, gradient: Array, groups: int) -> Gradients:
        """Adds into total in place; all of its channels are returned."""
        buffer, conv = operands.x, operands.conv
        rows = buffer.shape[0] * buffer.shape[1] * buffer.shape[2]
        flat = [array.reshape(rows, -1) for array in (total, buffer, gradient)]
        added, scale, bias, kernel = on_each_device(
            add_gradients.implementation(self.kernels),
            self.mesh,
            groups,
            by_example=(True, True, False, False, False, True),
            results=("example", "group", "group", "whole"),
        )(*flat[:2], conv.scale, conv.bias, conv.kernel[0, 0], flat[2])
        return Gradients(added.reshape(total.shape), scale, bias, kernel[None, None])
