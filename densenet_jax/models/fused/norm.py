"""Normalizes a feature map once: the forward pass and its derivative."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from densenet_jax.dtypes import DType, wide
from densenet_jax.models.layers import BatchStats, NormOptions, compute_stats, normalize, per_example

Tree = TypeVar("Tree")
Sums = tuple[Array, Array]  # each float[g, c], over a group of examples: of a gradient, and of the gradient times x_hat
Compute = Callable[..., Any]  # `call`, or what a backend has instead


def call(function: Callable[..., tuple[Array, ...]], *vectors: Float[Array, "..."]) -> tuple[Float[Array, "..."], ...]:
    """Calls an elementwise function, which has to be hashable, of arrays float[g, c] or float[c]."""
    return function(*vectors)


class Normalization(NamedTuple):
    """The normalization that made x_hat of feature maps x.

    Attributes:
        epsilon: of the norm; None: the norm is frozen and x_hat is x.
        grad_stats: the gradients of stats, where something else reads them.
    """

    stats: BatchStats
    epsilon: float | None
    grad_stats: BatchStats | None = None

    def apply(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Returns x_hat in x's dtype."""
        return x if self.epsilon is None else normalize(x, self.stats, self.epsilon).astype(x.dtype)

    def gradient(
        self, gradient: Float[Array, "b h w c"], x_hat: Float[Array, "b h w c"], sums: Sums, compute: Compute = call
    ) -> Float[Array, "b h w c"]:
        """Returns the gradient of x: rstd * (g - mean(g) - x_hat * mean(g * x_hat)), plus that through the statistics.

        g is the gradient of x_hat, sums are of g and of g * x_hat over each group of examples. The result is
        computed in float32 or wider, in x_hat's dtype.
        """
        if self.epsilon is None:
            return gradient.astype(x_hat.dtype)
        dtype = wide(gradient.dtype)
        count = gradient.size // gradient.shape[-1] // self.stats.var.shape[0]
        terms = self._terms(sums, count, self.epsilon, dtype, compute)
        rstd, mean_grad, mean_product = (per_example(term, gradient.shape[0]) for term in terms)
        grad_x = (gradient.astype(dtype) - mean_grad - x_hat.astype(dtype) * mean_product) * rstd
        return grad_x.astype(x_hat.dtype)

    def gradient_factors(self, sums: Sums, count: int) -> Float[Array, "g 3 c"]:
        """Returns a, b, c with gradient(g, x_hat) == a * g + b * x_hat + c; count is a group's positions."""
        if self.epsilon is None:
            one = jnp.ones_like(sums[0])
            return jnp.stack((one, 0 * one, 0 * one), axis=1)
        dtype = wide(self.stats.var.dtype)
        rstd, mean_grad, mean_product = self._terms(sums, count, self.epsilon, dtype)
        return jnp.stack((rstd, -mean_product * rstd, -mean_grad * rstd), axis=1)

    def select(self, start: int, end: int) -> Normalization:
        """Returns the normalization of channels start to end."""
        stats, grad_stats = select_channels((self.stats, self.grad_stats), start, end)
        return Normalization(stats, self.epsilon, grad_stats)

    def mean_and_rstd(self, compute: Compute = call) -> tuple[Float[Array, "g c"], Float[Array, "g c"]]:
        """Returns the mean and 1 / deviation that make x_hat of x."""
        mean, var = self.stats
        if self.epsilon is None:
            return jnp.zeros_like(mean), jnp.ones_like(mean)
        (rstd,) = compute(_rstd(self.epsilon), var)
        return mean, rstd

    def _terms(
        self, sums: Sums, count: int, epsilon: float, dtype: DType, compute: Compute = call
    ) -> tuple[Array, Array, Array]:
        """Returns 1 / deviation and the means over a group of the gradient and of the gradient times x_hat."""
        others = () if self.grad_stats is None else self.grad_stats
        return compute(_gradient_terms(epsilon, count), self.stats.var.astype(dtype), *sums, *others)


@functools.cache
def _rstd(epsilon: float) -> Callable[..., tuple[Array]]:
    return lambda var: (1 / jnp.sqrt(var + epsilon),)


@functools.cache
def _gradient_terms(epsilon: float, count: int) -> Callable[..., tuple[Array, Array, Array]]:
    def terms(
        var: Array, sum_grad: Array, sum_product: Array, grad_mean: Array | None = None, grad_var: Array | None = None
    ) -> tuple[Array, Array, Array]:
        deviation = jnp.sqrt(var + epsilon)
        if grad_mean is not None and grad_var is not None:
            sum_grad = sum_grad - grad_mean * deviation
            sum_product = sum_product - 2 * grad_var * deviation**2
        return 1 / deviation, sum_grad / count, sum_product / count

    return terms


def make_normalization(
    x: Float[Array, "b h w c"], options: NormOptions, shift: Array | None, stats: BatchStats | None = None
) -> Normalization:
    """Computes the normalization of x, from its statistics where they are known.

    shift, float[c], is near the mean, for accurate statistics; None: the norms are frozen and x_hat is x.
    """
    if shift is None:
        dtype = wide(x.dtype)
        return Normalization(BatchStats(jnp.zeros((1, x.shape[-1]), dtype), jnp.ones((1, x.shape[-1]), dtype)), None)
    return Normalization(stats or compute_stats(x, options.group_size, shift), options.epsilon)


def select_channels(tree: Tree, start: int, end: int) -> Tree:
    """Returns channels start to end of statistics or sums, float[g, c]."""
    return jax.tree.map(lambda array: array[:, start:end], tree)


def concatenate_stats(stats: list[BatchStats]) -> BatchStats:
    """Returns the statistics of concatenated feature maps."""
    return BatchStats(*(jnp.concatenate(parts, axis=-1) for parts in zip(*stats, strict=True)))
