"""Reading a normalized feature map: relu(scale * x^ + bias), convolved; and the derivative of that.

The derivative recomputes the rectified values instead of storing them. What a batch norm's own derivative needs over
the whole batch, the sums of the gradient and of the gradient times x^, are the gradients of bias and scale: they come
from passes over the gradient, or from the kernels that compute it.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from densenet_jax.kernels.cpu import convolution
from densenet_jax.kernels.cpu import reader as cpu
from densenet_jax.kernels.cpu.convolution import dilated
from densenet_jax.kernels.dtypes import wide
from densenet_jax.models.arithmetic import Arithmetic
from densenet_jax.models.layers import Moments, NormOptions, convolve, group_count, scale_shift
from densenet_jax.models.normalization import Normalization


class Reader(NamedTuple):
    """What a reader of c channels reads with: scale and bias float[c], kernel float[k, k, c / channel_groups, o]."""

    scale: Array
    bias: Array
    kernel: Array


class Window(NamedTuple):
    """How a reader's kernel goes over a map.

    Attributes:
      stride: pixels from one place to the next.
      channel_groups: of the convolution; the kernel is float[k, k, c / channel_groups, o].
    """

    stride: int = 1
    channel_groups: int = 1


EVERYWHERE = Window()


class ReaderGradients(NamedTuple):
    """Gradients of one reader.

    Attributes:
      inputs: float[b, h, w, c], of x^, in float32 or wider.
      scale, bias: float[g, c], a row for each group of examples; the parameter's gradient is the sum over rows.
      kernel: like the reader's, float32 or wider.
    """

    inputs: Array
    scale: Array
    bias: Array
    kernel: Array


def _is_dot(x: Array, kernel: Array, arithmetic: Arithmetic) -> bool:
    """Whether a convolution is a product of matrices; the CPU's library, where it is there, is no slower than XLA's."""
    if arithmetic.pointwise != "dot" or kernel.shape[:2] != (1, 1):
        return False
    return not (arithmetic.library and convolution.usable(x, kernel.astype(x.dtype)))


def contract(
    x: Float[Array, "b h w c"], kernel: Float[Array, "k k c o"], arithmetic: Arithmetic
) -> Float[Array, "b h w o"]:
    """The convolution that keeps the map's size."""
    if _is_dot(x, kernel, arithmetic):
        return lax.dot_general(x, kernel[0, 0].astype(x.dtype), (((3,), (0,)), ((), ())))
    return convolve(x, kernel, padding=kernel.shape[0] // 2)


def _contract_inputs_gradient(
    gradient: Float[Array, "b h w o"], kernel: Float[Array, "k k c o"], arithmetic: Arithmetic
) -> Float[Array, "b h w c"]:
    if _is_dot(gradient, kernel, arithmetic):
        return lax.dot_general(gradient, kernel[0, 0].astype(gradient.dtype), (((3,), (1,)), ((), ())))
    inputs = jnp.zeros((*gradient.shape[:3], kernel.shape[2]), gradient.dtype)
    _, pullback = jax.vjp(lambda x: contract(x, kernel, arithmetic), inputs)
    return pullback(gradient)[0]


def _contract_kernel_gradient(
    x: Float[Array, "b h w c"], gradient: Float[Array, "b h w o"], size: int, arithmetic: Arithmetic
) -> Float[Array, "k k c o"]:
    """In float32 or wider where the product allows it, else in the activations' dtype."""
    kernel = jnp.zeros((size, size, x.shape[3], gradient.shape[3]), x.dtype)
    if _is_dot(x, kernel, arithmetic):
        dimensions = (((0, 1, 2), (0, 1, 2)), ((), ()))
        found = lax.dot_general(x, gradient, dimensions, preferred_element_type=wide(x.dtype))
        return found.reshape(kernel.shape)
    _, pullback = jax.vjp(lambda kernel: contract(x, kernel, arithmetic), kernel)
    return pullback(gradient)[0].astype(wide(x.dtype))


def rectify(x: Float[Array, "b h w c"], scale: Float[Array, " c"], bias: Float[Array, " c"]) -> Float[Array, "b h w c"]:
    """relu(scale * x + bias), computed in float32 or wider, in x's dtype."""
    return jax.nn.relu(scale_shift(x, scale, bias, x.dtype))


def read(
    x: Float[Array, "b h w c"],
    reader: Reader,
    arithmetic: Arithmetic,
    norm: Normalization | None = None,
    window: Window = EVERYWHERE,
) -> Float[Array, "b h2 w2 o"]:
    """What a reader gives of a map, which norm normalizes before; without one it is x^ already.

    The map may have more channels than the reader, which come after.
    """
    x, norm = _of_one_norm(x, norm)
    if arithmetic.library and is_read_by_library(x, reader):
        few, reading, strided = _operands(x, reader, norm, window)
        return cpu.read(few, reading, **strided)
    x = x[..., : reader.scale.shape[0]]
    activation = rectify(normalized(x, norm), reader.scale, reader.bias)
    if window == EVERYWHERE:
        return contract(activation, reader.kernel, arithmetic)
    return _convolve(activation, reader.kernel, window)


def _convolve(activation: Array, kernel: Array, window: Window) -> Array:
    padding = kernel.shape[0] // 2
    return convolve(activation, kernel, stride=window.stride, padding=padding, groups=window.channel_groups)


def _operands(
    x: Array, reader: Reader, norm: Normalization | None, window: Window
) -> tuple[Array, cpu.Reading, dict[str, int]]:
    """What the library reads of a map, with what, and how: at a stride a 1x1 kernel reads few of the pixels."""
    stride = window.stride
    if stride > 1 and reader.kernel.shape[0] == 1:
        x, stride = x[:, ::stride, ::stride], 1
    return x, _reading(x, reader, norm), {"stride": stride, "groups": window.channel_groups}


def read_with_moments(
    x: Float[Array, "b h w c"],
    reader: Reader,
    shift: Float[Array, " o"] | None,
    options: NormOptions,
    arithmetic: Arithmetic,
    norm: Normalization | None = None,
    total: Float[Array, "b h2 w2 o"] | None = None,
    window: Window = EVERYWHERE,
) -> tuple[Float[Array, "b h2 w2 o"], Moments | None]:
    """`read`, added to total, and the moments of the sum where they come with it: by the CPU's library.

    Args:
      x: what is read.
      reader: with what.
      shift: that moments are taken about; None: none are wanted.
      options: of the norm whose moments these are.
      arithmetic: how.
      norm: as for `read`.
      total: what is added to, in place where nothing else reads it; None is nothing.
      window: as for `read`; with a total, its default.
    """
    assert total is None or window == EVERYWHERE
    by_library = arithmetic.library and is_read_by_library(x, reader)
    sums_moments = shift is not None and group_count(x.shape[0], options.group_size) == 1
    if not by_library or (total is None and not sums_moments):
        out = read(x, reader, arithmetic, norm, window)
        return out if total is None else total + out, None
    x, norm = _of_one_norm(x, norm)
    few, reading, strided = _operands(x, reader, norm, window)
    about = jnp.zeros(reader.kernel.shape[-1], x.dtype) if shift is None else shift.astype(x.dtype)
    if total is None:
        out, first, second = cpu.read_with_moments(few, reading, about, **strided)
    else:
        out, first, second = cpu.add_read_with_moments(total, few, reading, about)
    return out, _moments_of_sums(first, second, shift, out) if sums_moments else None


def _of_one_norm(x: Array, norm: Normalization | None) -> tuple[Array, Normalization | None]:
    """The map, normalized where its examples have several norms, and the one norm that is left to apply."""
    if norm is None or norm.moments.mean.shape[0] == 1:
        return x, norm
    return norm.apply(x), None


def _moments_of_sums(total: Array, square: Array, shift: Array | None, out: Float[Array, "b h w c"]) -> Moments:
    """Of a map, from the sums over all positions of it less shift and of the square of that."""
    assert shift is not None
    count = out.size // out.shape[-1]
    mean = total / count
    variance = jnp.maximum(square / count - jnp.square(mean), 0)
    return Moments((mean + shift.astype(mean.dtype))[None, :], variance[None, :])


def normalized(x: Float[Array, "b h w c"], norm: Normalization | None) -> Float[Array, "b h w c"]:
    """x^ of a map, or the map."""
    return x if norm is None else norm.apply(x)


def is_read_by_library(x: Array, reader: Reader) -> bool:
    """Whether the CPU's library is there and knows these operands; shapes and dtypes are all that is looked at."""
    return cpu.usable(x, reader.kernel)


def _reading(x: Array, reader: Reader, norm: Normalization | None = None) -> cpu.Reading:
    """A reader's arrays as the library takes them, with those of the norm before it, all of whose examples are one."""
    mean = reciprocal = jnp.zeros((0,), x.dtype)
    if norm is not None and norm.epsilon is not None:
        mean, reciprocal = (array[0].astype(x.dtype) for array in norm.mean_and_reciprocal())
    return cpu.Reading(mean, reciprocal, *(array.astype(x.dtype) for array in reader))


def sum_by_group(x: Float[Array, "b h w c"], groups: int) -> Float[Array, "g c"]:
    """Sums over positions and the examples of each group, in float32 or wider."""
    grouped = x.astype(wide(x.dtype)).reshape(groups, -1, *x.shape[1:])
    return jnp.sum(grouped, axis=(1, 2, 3))


def read_gradients(
    x: Float[Array, "b h w c"],
    reader: Reader,
    gradient: Float[Array, "b h2 w2 o"],
    groups: int,
    arithmetic: Arithmetic,
    norm: Normalization | None = None,
    window: Window = EVERYWHERE,
) -> ReaderGradients:
    """The derivative of `read`.

    Args:
      x: what was read; it may have more channels than the reader, which come after.
      reader: with what.
      gradient: of the output.
      groups: of examples that scale and bias gradients are wanted for.
      arithmetic: how.
      norm: as for `read`.
      window: likewise.
    """
    if arithmetic.library and groups == 1 and is_read_by_library(x, reader):
        few, reading, strided = _operands(x, reader, norm, window)
        of_few, *others = cpu.gradients(few, reading, gradient, **strided)
        if strided["stride"] != window.stride:
            sizes = (x.shape[1], x.shape[2])
            of_few = dilated(of_few, reader.kernel, sizes=sizes, stride=window.stride, padding=0)
        return _of_one_group(of_few, *others)
    x = normalized(x, norm)
    if window == EVERYWHERE:
        return read_gradients_before_relu(x, reader, gradient, groups, arithmetic)[1]
    activation = rectify(x, reader.scale, reader.bias)
    _, pullback = jax.vjp(functools.partial(_convolve, window=window), activation, reader.kernel)
    rectified, kernel = pullback(gradient)
    return ReaderGradients(*rectifier_gradients(rectified, activation, x, reader.scale, groups), kernel)


def _of_one_group(of_x: Array, of_scale: Array, of_bias: Array, of_kernel: Array) -> ReaderGradients:
    """Gradients that the library gives of one group of examples."""
    return ReaderGradients(of_x, of_scale[None, :], of_bias[None, :], of_kernel)


def read_gradients_before_relu(
    x: Float[Array, "b h w c2"],
    reader: Reader,
    gradient: Float[Array, "b h w o"],
    groups: int,
    arithmetic: Arithmetic,
) -> tuple[Float[Array, "b h w c"], ReaderGradients]:
    """The gradient of relu(scale * x + bias), and `read_gradients`, all in XLA's operations."""
    x = x[..., : reader.scale.shape[0]]
    activation = rectify(x, reader.scale, reader.bias)
    rectified = _contract_inputs_gradient(gradient, reader.kernel, arithmetic)
    kernel = _contract_kernel_gradient(activation, gradient, reader.kernel.shape[0], arithmetic)
    found = rectifier_gradients(rectified, activation, x, reader.scale, groups)
    return rectified, ReaderGradients(*found, kernel)


def rectifier_gradients(
    gradient: Float[Array, "b h w c"],
    activation: Float[Array, "b h w c"],
    x: Float[Array, "b h w c"],
    scale: Float[Array, " c"],
    groups: int,
) -> tuple[Float[Array, "b h w c"], Float[Array, "g c"], Float[Array, "g c"]]:
    """From the gradient of the activation relu(scale * x + bias) to those of x, scale and bias, float32 or wider."""
    kind = wide(x.dtype)
    opened = jnp.where(activation > 0, gradient, jnp.zeros_like(gradient)).astype(kind)
    of_scale, of_bias = sum_by_group(opened * x.astype(kind), groups), sum_by_group(opened, groups)
    return opened * scale.astype(kind)[None, None, None, :], of_scale, of_bias


def sums_of_gradient(
    gradient: Float[Array, "b h w c"], normalized: Float[Array, "b h w c"], groups: int
) -> tuple[Float[Array, "g c"], Float[Array, "g c"]]:
    """Of a gradient of x^, and of it times x^, over the examples of each group."""
    return sum_by_group(gradient, groups), sum_by_group(gradient.astype(wide(gradient.dtype)) * normalized, groups)


def sums_by_reader(
    scale: Float[Array, " c"], of_scale: Float[Array, "g c"], of_bias: Float[Array, "g c"]
) -> tuple[Float[Array, "g c"], Float[Array, "g c"]]:
    """The same of the gradient that a reader gives, by the gradients of its scale and bias."""
    scale = scale.astype(of_scale.dtype)[None, :]
    return of_bias * scale, of_scale * scale


def adds_in_place(x: Array, total: Array, reader: Reader, groups: int) -> bool:
    """Whether the CPU's library takes these operands of `add_read_gradients`."""
    return groups == 1 and total.dtype == x.dtype and is_read_by_library(x, reader)


def add_read_gradients(
    total: Float[Array, "b h w c2"],
    x: Float[Array, "b h w c3"],
    reader: Reader,
    gradient: Float[Array, "b h w o"],
    norm: Normalization | None = None,
) -> ReaderGradients:
    """`read_gradients` with its inputs those of all readers so far: total, with this one's part added in place."""
    return _of_one_group(*cpu.add_gradients(total, x, _reading(x, reader, norm), gradient))
