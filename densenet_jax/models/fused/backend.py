"""Defines the operations of the fused blocks: methods, here in XLA's operations, that platforms override."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Float

from densenet_jax.dtypes import DType, wide
from densenet_jax.kernels.select import BlockShape
from densenet_jax.models import layers
from densenet_jax.models.fused.norm import Normalization, Sums, call, select_channels
from densenet_jax.models.fused.norm_relu_conv import (
    DENSE,
    Gradients,
    NormReluConv,
    Operands,
    Window,
    norm_relu,
    norm_relu_gradients,
    sums_from_gradients,
)
from densenet_jax.models.layers import BatchNorm, BatchStats, NormOptions, dropout, group_count

Buffer = Any  # one array float[b, h, w, c] or a tuple of arrays, as a backend keeps a block's feature maps


class DenseLayer(NamedTuple):
    """Arrays of one dense layer that are differentiated; second is None without a bottleneck."""

    first: NormReluConv
    second: NormReluConv | None


class SavedLayer(NamedTuple):
    """Inputs of the backward pass of one layer.

    Attributes:
        norm: of all of the block's feature maps, whose x_hat the buffer holds.
        sums: of the gradient of x_hat so far.
        bottleneck: returns the first convolution's output, recomputed if it was not kept.
    """

    layer: DenseLayer
    buffer: Buffer
    norm: Normalization
    sums: Sums
    bottleneck: Callable[[], Array] | None
    bottleneck_norm: Normalization | None
    dropout_rate: float
    dropout_keys: tuple[Array | None, Array | None]

    @property
    def channels(self) -> tuple[int, int]:
        """First channel of the layer's output in the buffer, and the channel after its last."""
        start = self.layer.first.scale.shape[0]
        return start, start + (self.layer.second or self.layer.first).kernel.shape[-1]


@dataclass(frozen=True)
class Backend:
    """Operations of the fused blocks in XLA; platforms override what they do better.

    Overriding changes speed and memory, never the function.

    Attributes:
        mesh: divides the batch where kernels compute; each device takes its own part.
        kernels: "auto", "xla", "pallas", or "interpret", which runs kernels step by step on any platform, for tests.
        remat_bottleneck: recompute the bottlenecks' outputs in the backward pass by default.
        barrier_after_layer: compute all gradients of a layer before those of the next one; waiting ones keep their
            operands in memory.
        pool_in_conv: a transition averages in its convolution's kernel instead of before the convolution.
        in_place: kernels read the front of a buffer and add gradients into it where they lie.
    """

    mesh: Mesh | None = None
    kernels: str = "auto"
    remat_bottleneck: bool = False
    barrier_after_layer: bool = False
    pool_in_conv: ClassVar[bool] = False
    in_place: ClassVar[bool] = False

    def for_block(self, shape: BlockShape, dtype: DType, group_size: int) -> Backend:
        """Returns the backend for one dense block, with kernels where they exist and are wanted.

        Raises:
            UserError: kernels are wanted that do not exist for the platform, the shape or the dtype.
        """
        del shape, dtype, group_size
        return self

    def reads_buffer(self, x: Array, kernel: Array) -> bool:
        """Whether a kernel reads the front of a buffer; then evaluation keeps one as well."""
        del x, kernel
        return False

    # A buffer holds x_hat of a block's input and of its layers' outputs.

    def new_buffer(self, first: Float[Array, "b h w c"], width: int) -> Buffer:
        """Makes a buffer of width channels that begins with the first feature maps."""
        return jnp.pad(first, ((0, 0), (0, 0), (0, 0), (0, width - first.shape[-1])))

    def append(self, buffer: Buffer, new: Array, start: int) -> Buffer:
        """Returns the buffer with new feature maps behind the first `start` channels."""
        return lax.dynamic_update_slice_in_dim(buffer, new, start, axis=3)

    def channels(self, buffer: Buffer, start: int, end: int) -> Array:
        """Returns channels start to end, which must be whole appended pieces."""
        return buffer[..., start:end]

    def readable(self, buffer: Buffer, width: int) -> Array:
        """Returns the first channels for a `norm_relu_conv`, which ignores any that follow."""
        return self.channels(buffer, 0, width)

    def finish_buffer(self, buffer: Buffer) -> Buffer:
        """Returns the buffer after a block has written its last feature maps."""
        return buffer

    # Convolutions.

    def convolve(
        self, x: Array, kernel: Array, *, stride: int = 1, padding: int = 0, groups: int = 1
    ) -> Float[Array, "b h2 w2 o"]:
        """Computes `layers.convolve`."""
        return layers.convolve(x, kernel, stride=stride, padding=padding, groups=groups)

    def convolve_stem(self, x: Array, kernel: Array, stride: int) -> Float[Array, "b h2 w2 o"]:
        """Convolves an image, padded by half the kernel's size."""
        return self.convolve(x, kernel, stride=stride, padding=kernel.shape[0] // 2)

    def is_dot(self, x: Array, kernel: Array) -> bool:
        """Whether a convolution at stride 1 is computed as a product of matrices."""
        del x
        return kernel.shape[:2] == (1, 1)

    def convolve_same(self, x: Float[Array, "b h w c"], kernel: Float[Array, "k k c o"]) -> Float[Array, "b h w o"]:
        """Convolves at stride 1, keeping the size."""
        if self.is_dot(x, kernel):
            return lax.dot_general(x, kernel[0, 0].astype(x.dtype), (((3,), (0,)), ((), ())))
        return self.convolve(x, kernel, padding=kernel.shape[0] // 2)

    def _input_gradient(self, gradient: Array, kernel: Array) -> Float[Array, "b h w c"]:
        if self.is_dot(gradient, kernel):
            return lax.dot_general(gradient, kernel[0, 0].astype(gradient.dtype), (((3,), (1,)), ((), ())))
        inputs = jnp.zeros((*gradient.shape[:3], kernel.shape[2]), gradient.dtype)
        _, pullback = jax.vjp(lambda x: self.convolve_same(x, kernel), inputs)
        return pullback(gradient)[0]

    def _kernel_gradient(self, x: Array, gradient: Array, size: int) -> Float[Array, "k k c o"]:
        """Returns float32 or wider: accumulated so by a matrix product, else cast from the activations' dtype."""
        kernel = jnp.zeros((size, size, x.shape[3], gradient.shape[3]), x.dtype)
        if self.is_dot(x, kernel):
            dimensions = (((0, 1, 2), (0, 1, 2)), ((), ()))
            product = lax.dot_general(x, gradient, dimensions, preferred_element_type=wide(x.dtype))
            return product.reshape(kernel.shape)
        _, pullback = jax.vjp(lambda kernel: self.convolve_same(x, kernel), kernel)
        return pullback(gradient)[0].astype(wide(x.dtype))

    # relu(scale * x_hat + bias), convolved.

    def norm_relu_conv(self, operands: Operands) -> Float[Array, "b h2 w2 o"]:
        """Applies norm, scale and bias, ReLU and convolution."""
        conv = operands.conv
        return self._convolve_window(norm_relu(operands.x_hat(), conv.scale, conv.bias), conv.kernel, operands.window)

    def _convolve_window(self, activation: Array, kernel: Array, window: Window) -> Array:
        if window == DENSE:
            return self.convolve_same(activation, kernel)
        padding = kernel.shape[0] // 2
        return self.convolve(activation, kernel, stride=window.stride, padding=padding, groups=window.channel_groups)

    def norm_relu_conv_with_stats(
        self,
        operands: Operands,
        shift: Float[Array, " o"] | None,
        options: NormOptions,
        total: Float[Array, "b h2 w2 o"] | None = None,
    ) -> tuple[Float[Array, "b h2 w2 o"], BatchStats | None]:
        """Computes `norm_relu_conv`, adds it to total, and returns the sum's statistics if a kernel computes them too.

        Args:
            shift: near the sum's mean, for accurate statistics; None: none are wanted.
            total: added, in place where nothing else reads it; None is nothing.
        """
        del shift, options
        out = self.norm_relu_conv(operands)
        return out if total is None else total + out, None

    def conv_from_buffer(
        self, buffer: Buffer, conv: NormReluConv, shift: Float[Array, " o"] | None, options: NormOptions
    ) -> tuple[Float[Array, "b h w o"], BatchStats | None]:
        """Computes a dense layer's first convolution from the front of its block's buffer."""
        x = self.readable(buffer, conv.scale.shape[0])
        return self.norm_relu_conv_with_stats(Operands(x, conv), shift, options)

    def norm_relu_conv_grads(self, operands: Operands, gradient: Float[Array, "b h2 w2 o"], groups: int) -> Gradients:
        """Computes the gradients of `norm_relu_conv`; scale's and bias's have a row for each group of examples."""
        x, conv, window = operands.x_hat(), operands.conv, operands.window
        if window == DENSE:
            return self._grads_before_relu(x, conv, gradient, groups)[1]
        activation = norm_relu(x, conv.scale, conv.bias)
        _, pullback = jax.vjp(lambda a, kernel: self._convolve_window(a, kernel, window), activation, conv.kernel)
        grad_activation, kernel = pullback(gradient)
        return Gradients(*norm_relu_gradients(grad_activation, activation, x, conv.scale, groups), kernel)

    def _grads_before_relu(
        self, x: Array, conv: NormReluConv, gradient: Array, groups: int
    ) -> tuple[Float[Array, "b h w c"], Gradients]:
        """Returns the gradient of the ReLU's output, and `norm_relu_conv_grads`."""
        activation = norm_relu(x, conv.scale, conv.bias)
        grad_activation = self._input_gradient(gradient, conv.kernel)
        kernel = self._kernel_gradient(activation, gradient, conv.kernel.shape[0])
        grads = norm_relu_gradients(grad_activation, activation, x, conv.scale, groups)
        return grad_activation, Gradients(*grads, kernel)

    def accumulate_grads(
        self, total: Float[Array, "b h w c2"], operands: Operands, gradient: Float[Array, "b h w o"], groups: int
    ) -> Gradients:
        """Computes `norm_relu_conv_grads` of a buffer with the gradient of x_hat added to total's first c channels.

        The result may lack the channels after these; without a kernel it does.
        """
        width = operands.conv.scale.shape[0]
        operands = operands._replace(x=self.readable(operands.x, width))
        grads = self.norm_relu_conv_grads(operands, gradient, groups)
        added = (total[..., :width].astype(grads.x.dtype) + grads.x).astype(total.dtype)
        return grads._replace(x=added)

    # A 1x1 convolution of the operands' x and of x_hat of another map side by side, as far as there are parameters.

    def joined_conv(
        self, operands: Operands, other: Array, shift: Float[Array, " o"] | None, options: NormOptions
    ) -> tuple[Float[Array, "b h w o"], BatchStats | None] | None:
        """Computes `norm_relu_conv_with_stats` of both; None if it is the sum of their own that has to be computed."""
        del operands, other, shift, options
        return None

    def accumulate_joined_grads(
        self, total: Array, operands: Operands, other: Array, gradient: Float[Array, "b h w o"], groups: int
    ) -> tuple[Array, Gradients] | None:
        """Returns total with the other map's gradient added to its first channels and the rest of them; or None."""
        del total, operands, other, gradient, groups
        return None

    # A 1x1 convolution onto two maps side by side, the first added to a total.

    def forked_conv(
        self, total: Array, operands: Operands, shifts: Sequence[Float[Array, " _"] | None], options: NormOptions
    ) -> tuple[tuple[Array, BatchStats | None], ...] | None:
        """Computes `norm_relu_conv_with_stats` of either; None if their own products have to be computed."""
        del total, operands, shifts, options
        return None

    def forked_conv_grads(self, operands: Operands, gradients: Sequence[Array], groups: int) -> Gradients | None:
        """Computes `norm_relu_conv_grads` from the gradients of both maps; or None."""
        del operands, gradients, groups
        return None

    # Batch statistics.

    compute = staticmethod(call)

    def tails(self, vectors: Sequence[Float[Array, " _"]], size: int) -> list[Float[Array, " {size}"]]:
        """Returns the last values of each vector."""
        return [vector[-size:] for vector in vectors]

    def update_running(self, norms: Sequence[tuple[BatchNorm, BatchStats]], positions: int) -> None:
        """Updates the running statistics of norms by their channels' statistics over so many positions.

        A norm's channels are the first of the statistics' channels.
        """
        own = [
            stats if norm.features == stats.mean.shape[-1] else select_channels(stats, 0, norm.features)
            for norm, stats in norms
        ]
        for (norm, _), stats in zip(norms, own, strict=True):
            norm.update_running(stats, positions)

    def add_sums(self, sums: Sums, conv: NormReluConv, grads: Gradients) -> Sums:
        """Adds the sums of a layer's part of the gradient to the first channels of sums; may return only these."""
        start, own = conv.scale.shape[0], sums_from_gradients(conv.scale, grads.scale, grads.bias)
        return sums[0][:, :start] + own[0], sums[1][:, :start] + own[1]

    # The backward pass of a dense layer.

    def grad_before_norm(
        self, total: Array, buffer: Buffer, norm: Normalization, sums: Sums, start: int, end: int
    ) -> Float[Array, "b h w c"]:
        """Returns the gradient of channels start to end before their norm, from total, the gradient of x_hat."""
        x_hat = self.channels(buffer, 0, end)[..., start:end]
        own = select_channels(sums, start, end)
        return norm.select(start, end).gradient(total[..., start:end], x_hat, own, self.compute)

    def layer_backward(self, saved: SavedLayer, total: Float[Array, "b h w c"]) -> tuple[Gradients, DenseLayer]:
        """Computes the backward pass of one dense layer from total, the gradient of x_hat from all later layers.

        Returns the gradients of the first convolution, whose x is total with the layer's part added, and those of the
        layer's parameters.
        """
        (first, second), groups = saved.layer, saved.norm.stats.mean.shape[0]
        gradient = self.grad_before_norm(total, saved.buffer, saved.norm, saved.sums, *saved.channels)
        after_first, after_second = saved.dropout_keys
        grad_second = None
        if second is not None:
            gradient = dropout(gradient, saved.dropout_rate, after_second)
            gradient, grad_second = self._second_conv_backward(saved, second, gradient)
        gradient = dropout(gradient, saved.dropout_rate, after_first)
        grads = self.accumulate_grads(total, Operands(saved.buffer, first), gradient, groups)
        return grads, DenseLayer(grads.of_parameters(first), grad_second)

    def _second_conv_backward(
        self, saved: SavedLayer, conv: NormReluConv, gradient: Array
    ) -> tuple[Float[Array, "b h w o"], NormReluConv]:
        """Backpropagates from the layer's output to the first convolution's output."""
        assert saved.bottleneck is not None
        assert saved.bottleneck_norm is not None
        bottleneck, norm = saved.bottleneck(), saved.bottleneck_norm
        x_hat = norm.apply(bottleneck)
        grads = self._second_conv_grads(Operands(bottleneck, conv, norm), x_hat, gradient)
        sums = sums_from_gradients(conv.scale, grads.scale, grads.bias)
        grad_bottleneck = norm.gradient(grads.x, x_hat, sums, self.compute)
        return grad_bottleneck, grads.of_parameters(conv)

    def _second_conv_grads(self, operands: Operands, x_hat: Array, gradient: Array) -> Gradients:
        """Computes `norm_relu_conv_grads` of the bottleneck, whose x_hat is known."""
        assert operands.norm is not None
        return self.norm_relu_conv_grads(operands, gradient, operands.norm.stats.mean.shape[0])

    # The stem's maximum.

    def max_pool(self, x: Float[Array, "b h w c"], stride: int = 2) -> Float[Array, "b h2 w2 c"]:
        """Computes `layers.max_pool`."""
        return layers.max_pool(x, stride)

    def max_pool_forward(self, x: Array) -> tuple[Float[Array, "b h2 w2 c"], Any]:
        """Returns `max_pool` and the residuals, besides x, for `max_pool_backward`."""
        return self.max_pool(x), None

    def max_pool_backward(self, x: Array, saved: Any, gradient: Array) -> Float[Array, "b h w c"]:
        """Computes the gradient of `max_pool`'s input."""
        del saved
        return jax.vjp(self.max_pool, x)[1](gradient)[0]


def take_device_share(shape: BlockShape, group_size: int, mesh: Mesh | None) -> tuple[BlockShape, int] | None:
    """Returns the shape of one device's part of a block, and the number of groups; None if they don't divide evenly."""
    parts, groups = 1 if mesh is None else mesh.size, group_count(shape.examples, group_size)
    if shape.examples % parts or (groups > 1 and groups % parts):
        return None
    return shape._replace(examples=shape.examples // parts), groups
