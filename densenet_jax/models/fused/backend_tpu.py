"""The TPU backend: XLA's products over one buffer, and Pallas kernels for a dense layer's backward pass.

Over a mesh the kernels compute each device's own examples; sums over the batch are added up over the devices.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from densenet_jax.dtypes import DType
from densenet_jax.kernels.select import BlockShape, choose_layer_gradients, should_remat_bottleneck
from densenet_jax.kernels.shard import on_each_device, own_groups
from densenet_jax.kernels.tpu.conv1x1_gradients import conv1x1_gradients
from densenet_jax.kernels.tpu.conv3x3_gradients import conv3x3_gradients
from densenet_jax.kernels.tpu.tiles import put_examples_last
from densenet_jax.models.fused.backend import Backend, Buffer, DenseLayer, SavedLayer, take_device_share
from densenet_jax.models.fused.norm import Normalization, Sums, select_channels
from densenet_jax.models.fused.norm_relu_conv import Gradients, NormReluConv, sums_from_gradients
from densenet_jax.models.layers import BatchStats, NormOptions


@dataclass(frozen=True)
class TpuBackend(Backend):
    """Uses XLA's operations, with unwritten buffers and kernels for layers where `for_block` allows them."""

    unwritten_buffers: bool = False
    layer_kernels: bool = False
    pool_in_conv: ClassVar[bool] = True

    def for_block(self, shape: BlockShape, dtype: DType, group_size: int) -> Backend:
        """Returns the backend with what `kernels.select` chooses for one device's share of the block."""
        share = take_device_share(shape, group_size, self.mesh)
        if share is None:
            return self
        own, groups = share
        backend = replace(
            self,
            # Unwritten memory is allocated on every device for all examples unless the mesh divides it.
            unwritten_buffers=self.mesh is not None or jax.device_count() == 1,
            remat_bottleneck=should_remat_bottleneck(dtype, own),
            # Without kernels the compiler then needs more memory, not less (docs/performance.md).
            barrier_after_layer=self.kernels in ("pallas", "interpret"),
        )
        if own.drops or own_groups(self.mesh, groups) > 1:  # which the kernels don't support
            return backend
        devices = None if self.mesh is None else tuple(self.mesh.devices.flat)
        if self.kernels != "interpret" and choose_layer_gradients(dtype, own, self.kernels, devices) == "xla":
            return backend
        return replace(backend, layer_kernels=True)

    def new_buffer(self, first: Array, width: int) -> Buffer:
        """Makes a buffer whose other channels are unwritten where each device has its own."""
        if not self.unwritten_buffers:
            return super().new_buffer(first, width)

        def write(first: Array, groups: int) -> tuple[Array]:
            empty = lax.empty((*first.shape[:3], width), first.dtype)
            return (lax.dynamic_update_slice_in_dim(empty, first, 0, 3),)

        return on_each_device(write, self.mesh, 1, (True,), ("example",))(first)[0]

    def conv_from_buffer(
        self, buffer: Buffer, conv: NormReluConv, shift: Array | None, options: NormOptions
    ) -> tuple[Float[Array, "b h w o"], BatchStats | None]:
        """Puts the bottleneck into the layout that the kernels read."""
        out, stats = super().conv_from_buffer(buffer, conv, shift, options)
        if self.layer_kernels and self.kernels != "interpret":
            out = put_examples_last(out)
        return out, stats

    def grad_before_norm(
        self, total: Array, buffer: Buffer, norm: Normalization, sums: Sums, start: int, end: int
    ) -> Float[Array, "b h w c"]:
        """Stores the gradient once for the two convolutions that read it."""
        return lax.optimization_barrier(super().grad_before_norm(total, buffer, norm, sums, start, end))

    def layer_backward(self, saved: SavedLayer, total: Float[Array, "b h w c"]) -> tuple[Gradients, DenseLayer]:
        """Reads each feature map once, with two kernels: back to the bottleneck, and from there to the buffer."""
        first, second = saved.layer
        if not self.layer_kernels or second is None:
            return super().layer_backward(saved, total)
        assert saved.bottleneck is not None
        assert saved.bottleneck_norm is not None
        (start, end), sums = saved.channels, saved.sums
        count = total.size // total.shape[-1] // sums[0].shape[0]
        factors = saved.norm.select(start, end).gradient_factors(select_channels(sums, start, end), count)
        bottleneck, norm = saved.bottleneck(), saved.bottleneck_norm
        convolve = functools.partial(conv3x3_gradients.implementation(self.kernels), start=start)
        multiply = conv1x1_gradients.implementation(self.kernels)
        mean, rstd = norm.mean_and_rstd()
        groups = factors.shape[0]
        grouped = groups > 1
        grad_second = Gradients(
            *self._on_each_device(convolve, groups, (True, True, grouped, True, grouped, grouped, False, False, False))(
                total, saved.buffer, factors, bottleneck, mean, rstd, *second
            )
        )
        count = bottleneck.size // bottleneck.shape[-1] // groups
        own_sums = sums_from_gradients(second.scale, grad_second.scale, grad_second.bias)
        of_x_hat, of_bottleneck, constant = norm.gradient_factors(own_sums, count).swapaxes(0, 1)
        of_bottleneck = of_bottleneck * rstd
        of_masked = of_x_hat * second.scale.astype(mean.dtype)[None, :]
        coefficients = (of_masked, of_bottleneck, constant - of_bottleneck * mean)
        added, scale, bias, kernel = self._on_each_device(
            multiply, groups, (True, True, False, False, False, True, grouped)
        )(
            *(total, saved.buffer, first.scale, first.bias, first.kernel[0, 0], grad_second.x),
            jnp.stack(coefficients, axis=1),
        )
        grads = Gradients(added, scale, bias, kernel[None, None])
        return grads, DenseLayer(grads.of_parameters(first), grad_second.of_parameters(second))

    def _on_each_device(
        self, kernel: Callable[..., tuple[Array, ...]], groups: int, by_example: tuple[bool, ...]
    ) -> Callable[..., Any]:
        results = ("example", "group", "group", "whole")
        return on_each_device(lambda *operands, groups: kernel(*operands), self.mesh, groups, by_example, results)
