"""The CPU backend: compiled kernels read the front of a buffer, sum their output and add gradients in place.

XLA computes where the kernels were not built or don't support the operands.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from densenet_jax.dtypes import DType
from densenet_jax.kernels.cpu import convolution, elementwise, forked, joined, pooling
from densenet_jax.kernels.cpu import norm_relu_conv as cpu
from densenet_jax.kernels.select import BlockShape, check_wanted
from densenet_jax.models.fused.backend import Backend, Buffer
from densenet_jax.models.fused.norm import Normalization, Sums
from densenet_jax.models.fused.norm_relu_conv import Gradients, NormReluConv, Operands
from densenet_jax.models.layers import BatchNorm, BatchStats, NormOptions, group_count


@dataclass(frozen=True)
class CpuBackend(Backend):
    """Uses the compiled CPU kernels for the operands that they support."""

    in_place: ClassVar[bool] = True

    def for_block(self, shape: BlockShape, dtype: DType, group_size: int) -> Backend:
        """Checks that no Pallas kernels are wanted, which CPUs don't have."""
        check_wanted(self.kernels, "cpu", dtype)
        return self

    def readable(self, buffer: Buffer, width: int) -> Array:
        """Returns the whole buffer: the kernels read its front."""
        return buffer

    def append(self, buffer: Buffer, new: Array, start: int) -> Buffer:
        """Returns the buffer with new feature maps behind the first `start` channels."""
        if not elementwise.are_usable([buffer, new]):
            return super().append(buffer, new, start)
        return lax.dynamic_update_slice_in_dim(buffer, new, elementwise.hidden_number(start), axis=3)

    def tails(self, vectors: Sequence[Float[Array, " _"]], size: int) -> list[Float[Array, " {size}"]]:
        """Returns the last values of each vector."""
        if not elementwise.are_usable(vectors):
            return super().tails(vectors, size)
        return [elementwise.tail(lax.stop_gradient(vector), size) for vector in vectors]

    def convolve(
        self, x: Array, kernel: Array, *, stride: int = 1, padding: int = 0, groups: int = 1
    ) -> Float[Array, "b h2 w2 o"]:
        """Computes `layers.convolve`."""
        kernel = kernel.astype(x.dtype)
        if convolution.is_usable(x, kernel):
            return convolution.convolve(x, kernel, stride=stride, padding=padding, groups=groups)
        return super().convolve(x, kernel, stride=stride, padding=padding, groups=groups)

    def is_dot(self, x: Array, kernel: Array) -> bool:
        """Whether a convolution is computed as a product of matrices: if the kernels, which are as fast, can't."""
        return super().is_dot(x, kernel) and not convolution.is_usable(x, kernel.astype(x.dtype))

    def norm_relu_conv(self, operands: Operands) -> Float[Array, "b h2 w2 o"]:
        """Applies norm, ReLU and convolution in one pass."""
        operands = _apply_norm_of_groups(operands)
        if not _is_usable(operands):
            return super().norm_relu_conv(operands)
        x, arrays, strided = _kernel_operands(operands)
        return cpu.norm_relu_conv(x, arrays, **strided)

    def norm_relu_conv_with_stats(
        self, operands: Operands, shift: Array | None, options: NormOptions, total: Array | None = None
    ) -> tuple[Float[Array, "b h2 w2 o"], BatchStats | None]:
        """Sums the output for its statistics in the same pass."""
        has_stats = shift is not None and _are_one_group(operands.x, options)
        if not _is_usable(operands) or total is not None or not has_stats:
            return super().norm_relu_conv_with_stats(operands, shift, options, total)
        x, arrays, strided = _kernel_operands(operands)
        about = _about(shift, arrays.kernel.shape[-1], x)
        out, first, second = cpu.norm_relu_conv_with_sums(x, arrays, about, **strided)
        return out, _stats_from_sums(first, second, shift, out, options)

    def norm_relu_conv_grads(self, operands: Operands, gradient: Array, groups: int) -> Gradients:
        """Masks, scales and sums the gradient while it is in cache."""
        if groups != 1 or not _is_usable(operands):
            return super().norm_relu_conv_grads(operands, gradient, groups)
        x, arrays, strided = _kernel_operands(operands)
        grad_x, *others = cpu.gradients(x, arrays, gradient, **strided)
        stride = operands.window.stride
        if strided["stride"] != stride:
            sizes = (operands.x.shape[1], operands.x.shape[2])
            grad_x = convolution.dilate(grad_x, operands.conv.kernel, sizes=sizes, stride=stride, padding=0)
        return _add_group_axis(grad_x, *others)

    def accumulate_grads(self, total: Array, operands: Operands, gradient: Array, groups: int) -> Gradients:
        """Adds into total in place; all of its channels are returned."""
        if groups != 1 or total.dtype != operands.x.dtype or not _is_usable(operands):
            return super().accumulate_grads(total, operands, gradient, groups)
        x, arrays, _ = _kernel_operands(operands)
        return _add_group_axis(*cpu.add_gradients(total, x, arrays, gradient))

    def joined_conv(
        self, operands: Operands, other: Array, shift: Array | None, options: NormOptions
    ) -> tuple[Float[Array, "b h w o"], BatchStats | None] | None:
        """Computes one product, from where both maps lie."""
        if not joined.is_usable(operands.x, other, operands.conv.kernel):
            return None
        x, arrays, _ = _kernel_operands(_apply_norm_of_groups(operands))
        about = _about(shift, arrays.kernel.shape[-1], x)
        out, total, squares = joined.conv_with_sums(x, other, arrays, about)
        return out, _stats_from_sums(total, squares, shift, out, options)

    def accumulate_joined_grads(
        self, total: Array, operands: Operands, other: Array, gradient: Array, groups: int
    ) -> tuple[Array, Gradients] | None:
        """Adds into total in place; all of its channels are returned."""
        x, conv = operands.x, operands.conv
        if groups != 1 or total.dtype != x.dtype or not joined.is_usable(x, other, conv.kernel):
            return None
        x, arrays, _ = _kernel_operands(operands)
        total, *grads = joined.add_gradients(total, x, other, arrays, gradient)
        return total, _add_group_axis(*grads)

    def forked_conv(
        self, total: Array, operands: Operands, shifts: Sequence[Array | None], options: NormOptions
    ) -> tuple[tuple[Array, BatchStats | None], ...] | None:
        """Computes one product, to where both maps lie."""
        if not forked.is_usable(operands.x, total, operands.conv.kernel):
            return None
        x, arrays, _ = _kernel_operands(_apply_norm_of_groups(operands))
        width, whole = total.shape[-1], arrays.kernel.shape[-1]
        about = [_about(shift, n, x) for shift, n in zip(shifts, (width, whole - width), strict=True)]
        *outputs, sums, squares = forked.conv_with_sums(total, x, arrays, jnp.concatenate(about))
        halves = zip(outputs, shifts, (slice(width), slice(width, None)), strict=True)
        return tuple(
            (out, _stats_from_sums(sums[own], squares[own], shift, out, options)) for out, shift, own in halves
        )

    def forked_conv_grads(self, operands: Operands, gradients: Sequence[Array], groups: int) -> Gradients | None:
        """Reads both maps' gradients where they lie."""
        if groups != 1 or not forked.is_usable(operands.x, gradients[0], operands.conv.kernel):
            return None
        x, arrays, _ = _kernel_operands(operands)
        return _add_group_axis(*forked.gradients(x, arrays, *(gradient.astype(x.dtype) for gradient in gradients)))

    compute = staticmethod(elementwise.compute)

    def update_running(self, norms: Sequence[tuple[BatchNorm, BatchStats]], positions: int) -> None:
        """Updates the means of all norms in one call, and the variances in another."""
        variables = [(norm.mean, norm.var) for norm, _ in norms if not norm.is_initializing()]
        arrays = [array for norm, stats in norms for array in (norm.mean.value, *stats)]
        same = {(norm.options.momentum, norm.options.unbiased_running_variance) for norm, _ in norms}
        if len(variables) < len(norms) or len(same) != 1 or not elementwise.are_usable(arrays):
            return super().update_running(norms, positions)
        if any(stats.mean.shape[0] != 1 for _, stats in norms):
            return super().update_running(norms, positions)
        ((keep, unbiased),) = same
        correction = positions / max(positions - 1, 1) if unbiased else 1.0
        for number, factor in ((0, 1.0), (1, correction)):
            items = [
                (pair[number].value, lax.stop_gradient(stats[number]).reshape(-1))
                for pair, (_, stats) in zip(variables, norms, strict=True)
            ]
            new = elementwise.map_fronts(_blending(keep, factor), items)
            for pair, value in zip(variables, new, strict=True):
                pair[number].value = value
        return None

    def add_sums(self, sums: Sums, conv: NormReluConv, grads: Gradients) -> Sums:
        """Adds into the first channels of sums in place; all of their channels are returned."""
        if sums[0].shape[0] != 1 or not elementwise.are_usable([*sums, conv.scale, grads.scale, grads.bias]):
            return super().add_sums(sums, conv, grads)
        items = [(total[0], grad[0], conv.scale) for total, grad in zip(sums, (grads.bias, grads.scale), strict=True)]
        first, second = elementwise.map_fronts(_add_scaled, items)
        return first[None, :], second[None, :]

    def grad_before_norm(
        self, total: Array, buffer: Buffer, norm: Normalization, sums: Sums, start: int, end: int
    ) -> Float[Array, "b h w c"]:
        """Returns the gradient of channels start to end before their norm; the layers of a block share its program."""
        if start == 0 or not elementwise.are_usable([total, buffer]):
            return super().grad_before_norm(total, buffer, norm, sums, start, end)
        place = elementwise.hidden_number(start)

        def take(array: Array) -> Array:
            return lax.dynamic_slice_in_dim(array, place, end - start, axis=-1)

        norm = jax.tree.map(take, norm._replace(epsilon=None))._replace(epsilon=norm.epsilon)
        return norm.gradient(take(total), take(buffer), (take(sums[0]), take(sums[1])), self.compute)

    def max_pool(self, x: Array, stride: int = 2) -> Float[Array, "b h2 w2 c"]:
        """Computes `layers.max_pool`, whose derivative is a kernel."""
        return pooling.max_pool(x, 3, stride) if pooling.is_usable(x) else super().max_pool(x, stride)


@functools.cache
def _blending(keep: float, factor: float) -> Callable[[Array, Array], Array]:
    """Returns the update of a running value by a new one, which is multiplied by factor."""
    return lambda old, new: keep * old + (1 - keep) * (new * factor)


def _add_scaled(total: Array, grad: Array, scale: Array) -> Array:
    return total + grad * scale


def _is_usable(operands: Operands) -> bool:
    return cpu.is_usable(operands.x, operands.conv.kernel)


def _apply_norm_of_groups(operands: Operands) -> Operands:
    """Normalizes x if its groups have norms of their own, which the kernels don't support."""
    x, _, norm, _ = operands
    if norm is None or norm.stats.mean.shape[0] == 1:
        return operands
    return operands._replace(x=norm.apply(x), norm=None)


def _kernel_operands(operands: Operands) -> tuple[Array, cpu.Operands, dict[str, int]]:
    """Returns the kernels' operands and options; a strided 1x1 convolution gets only the pixels that it reads."""
    x, conv, norm, (stride, channel_groups) = operands
    if stride > 1 and conv.kernel.shape[0] == 1:
        x, stride = x[:, ::stride, ::stride], 1
    mean = rstd = jnp.zeros((0,), x.dtype)
    if norm is not None and norm.epsilon is not None:
        mean, rstd = (array[0].astype(x.dtype) for array in norm.mean_and_rstd(elementwise.compute))
    arrays = cpu.Operands(mean, rstd, *(array.astype(x.dtype) for array in conv))
    return x, arrays, {"stride": stride, "groups": channel_groups}


def _about(shift: Array | None, channels: int, x: Array) -> Float[Array, " c"]:
    """Returns what sums for statistics are about; these are not used without a shift."""
    return jnp.zeros(channels, x.dtype) if shift is None else shift.astype(x.dtype)


def _are_one_group(x: Array, options: NormOptions) -> bool:
    return group_count(x.shape[0], options.group_size) == 1


def _stats_from_sums(
    total: Array, squares: Array, shift: Array | None, out: Array, options: NormOptions
) -> BatchStats | None:
    """Returns the statistics of out from the sums over all positions of out - shift and of its square.

    None without a shift, and where groups of examples have statistics of their own.
    """
    if shift is None or not _are_one_group(out, options):
        return None
    statistics = _statistics(out.size // out.shape[-1])
    mean, var = elementwise.compute(statistics, total, squares, shift.astype(total.dtype))
    return BatchStats(mean[None, :], var[None, :])


@functools.cache
def _statistics(count: int) -> Callable[..., tuple[Array, Array]]:
    def statistics(total: Array, squares: Array, shift: Array) -> tuple[Array, Array]:
        mean = total / count
        return mean + shift, jnp.maximum(squares / count - jnp.square(mean), 0)

    return statistics


def _add_group_axis(grad_x: Array, scale: Array, bias: Array, kernel: Array) -> Gradients:
    return Gradients(grad_x, scale[None, :], bias[None, :], kernel)
