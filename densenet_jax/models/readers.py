"""Reading a normalised feature map: relu(scale * x^ + bias), convolved; and the derivative of that.

The derivative recomputes the rectified values instead of storing them. What a batch norm's own derivative needs over
the whole batch, the sums of the gradient and of the gradient times x^, are the gradients of bias and scale: they come
from passes over the gradient, or from the kernels that compute it.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from densenet_jax.kernels.cpu import reader as cpu
from densenet_jax.kernels.dtypes import wide
from densenet_jax.models.arithmetic import Arithmetic
from densenet_jax.models.layers import convolve, scale_shift


class Reader(NamedTuple):
    """What a reader of c channels reads with: scale and bias float[c], kernel float[k, k, c, o]."""

    scale: Array
    bias: Array
    kernel: Array


class ReaderGradients(NamedTuple):
    """Gradients of one reader.

    Attributes:
      inputs: float[b, h, w, c], of x^, in float32 or wider.
      scale, bias: float[g, c], a row for each group of examples; the parameter's gradient is the sum over rows.
      kernel: float[k, k, c, o], float32 or wider.
    """

    inputs: Array
    scale: Array
    bias: Array
    kernel: Array


def _is_dot(kernel: Array, arithmetic: Arithmetic) -> bool:
    return arithmetic.pointwise == "dot" and kernel.shape[:2] == (1, 1)


def contract(
    x: Float[Array, "b h w c"], kernel: Float[Array, "k k c o"], arithmetic: Arithmetic
) -> Float[Array, "b h w o"]:
    """The convolution that keeps the map's size."""
    if _is_dot(kernel, arithmetic):
        return lax.dot_general(x, kernel[0, 0].astype(x.dtype), (((3,), (0,)), ((), ())))
    return convolve(x, kernel, padding=kernel.shape[0] // 2)


def _contract_inputs_gradient(
    gradient: Float[Array, "b h w o"], kernel: Float[Array, "k k c o"], arithmetic: Arithmetic
) -> Float[Array, "b h w c"]:
    if _is_dot(kernel, arithmetic):
        return lax.dot_general(gradient, kernel[0, 0].astype(gradient.dtype), (((3,), (1,)), ((), ())))
    inputs = jnp.zeros((*gradient.shape[:3], kernel.shape[2]), gradient.dtype)
    _, pullback = jax.vjp(lambda x: contract(x, kernel, arithmetic), inputs)
    return pullback(gradient)[0]


def _contract_kernel_gradient(
    x: Float[Array, "b h w c"], gradient: Float[Array, "b h w o"], size: int, arithmetic: Arithmetic
) -> Float[Array, "k k c o"]:
    """In float32 or wider where the product allows it, else in the activations' dtype."""
    shape = (size, size, x.shape[3], gradient.shape[3])
    if size == 1 and arithmetic.pointwise == "dot":
        dimensions = (((0, 1, 2), (0, 1, 2)), ((), ()))
        return lax.dot_general(x, gradient, dimensions, preferred_element_type=wide(x.dtype)).reshape(shape)
    _, pullback = jax.vjp(lambda kernel: contract(x, kernel, arithmetic), jnp.zeros(shape, x.dtype))
    return pullback(gradient)[0].astype(wide(x.dtype))


def rectify(x: Float[Array, "b h w c"], scale: Float[Array, " c"], bias: Float[Array, " c"]) -> Float[Array, "b h w c"]:
    """relu(scale * x + bias), computed in float32 or wider, in x's dtype."""
    return jax.nn.relu(scale_shift(x, scale, bias, x.dtype))


def read(x: Float[Array, "b h w c"], reader: Reader, arithmetic: Arithmetic) -> Float[Array, "b h w o"]:
    """The reader's output, of a normalised map; x may have more channels than the reader, which come after."""
    if arithmetic.library and is_read_by_library(x, reader):
        return cpu.read(*_operands(x, reader))
    x = x[..., : reader.scale.shape[0]]
    return contract(rectify(x, reader.scale, reader.bias), reader.kernel, arithmetic)


def is_read_by_library(x: Array, reader: Reader) -> bool:
    """Whether the CPU's library is there and knows these operands; shapes and dtypes are all that is looked at."""
    return cpu.usable(*_operands(x, reader))


def _operands(x: Array, reader: Reader) -> tuple[Array, Array, Array, Array]:
    return x, reader.scale.astype(x.dtype), reader.bias.astype(x.dtype), reader.kernel.astype(x.dtype)


def sum_by_group(x: Float[Array, "b h w c"], groups: int) -> Float[Array, "g c"]:
    """Sums over positions and the examples of each group, in float32 or wider."""
    grouped = x.astype(wide(x.dtype)).reshape(groups, -1, *x.shape[1:])
    return jnp.sum(grouped, axis=(1, 2, 3))


def read_gradients(
    x: Float[Array, "b h w c"],
    reader: Reader,
    gradient: Float[Array, "b h w o"],
    groups: int,
    arithmetic: Arithmetic,
) -> ReaderGradients:
    """The derivative of `read`.

    Args:
      x: what was read; it may have more channels than the reader, which come after.
      reader: with what.
      gradient: of the output.
      groups: of examples that scale and bias gradients are wanted for.
      arithmetic: how.
    """
    operands = _operands(x, reader)
    if arithmetic.library and groups == 1 and cpu.usable(*operands):
        of_x, of_scale, of_bias, of_kernel = cpu.gradients(*operands, gradient)
        return ReaderGradients(of_x, of_scale[None, :], of_bias[None, :], of_kernel)
    return read_gradients_before_relu(x, reader, gradient, groups, arithmetic)[1]


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
    gradient: Float[Array, "b h w c"], normalised: Float[Array, "b h w c"], groups: int
) -> tuple[Float[Array, "g c"], Float[Array, "g c"]]:
    """Of a gradient of x^, and of it times x^, over the examples of each group."""
    return sum_by_group(gradient, groups), sum_by_group(gradient.astype(wide(gradient.dtype)) * normalised, groups)


def sums_by_reader(
    scale: Float[Array, " c"], of_scale: Float[Array, "g c"], of_bias: Float[Array, "g c"]
) -> tuple[Float[Array, "g c"], Float[Array, "g c"]]:
    """The same of the gradient that a reader gives, by the gradients of its scale and bias."""
    scale = scale.astype(of_scale.dtype)[None, :]
    return of_bias * scale, of_scale * scale


def adds_in_place(x: Array, total: Array, reader: Reader, groups: int) -> bool:
    """Whether the CPU's library takes these operands of `add_read_gradients`."""
    return groups == 1 and total.dtype == x.dtype and cpu.usable(*_operands(x, reader))


def add_read_gradients(
    total: Float[Array, "b h w c2"],
    x: Float[Array, "b h w c2"],
    reader: Reader,
    gradient: Float[Array, "b h w o"],
) -> ReaderGradients:
    """`read_gradients` with its inputs those of all readers so far: total, with this one's part added in place."""
    added, of_scale, of_bias, of_kernel = cpu.add_gradients(total, *_operands(x, reader), gradient)
    return ReaderGradients(added, of_scale[None, :], of_bias[None, :], of_kernel)
