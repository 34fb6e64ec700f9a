"""Normalizing a map once, and the derivative of that: from the gradient of x^ to that of the map."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from densenet_jax.kernels.dtypes import wide
from densenet_jax.models.layers import Moments, NormOptions, batch_moments, normalize, per_example


class Normalization(NamedTuple):
    """How maps became x^.

    Attributes:
      moments: of the maps.
      epsilon: the norm's; None: x^ is the map itself.
      of_moments: the gradients of the moments, where something else reads them.
    """

    moments: Moments
    epsilon: float | None
    of_moments: Moments | None = None

    def apply(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """x^ of the map, in the map's dtype."""
        return x if self.epsilon is None else normalize(x, self.moments, self.epsilon).astype(x.dtype)

    def gradient(
        self, gradient: Float[Array, "b h w c"], normalized: Float[Array, "b h w c"], sums: tuple[Array, Array]
    ) -> Float[Array, "b h w c"]:
        """Of the maps: rstd * (gradient - mean(gradient) - x^ * mean(gradient * x^)), and what comes by the moments.

        Args:
          gradient: of x^.
          normalized: x^.
          sums: float[g, c], of the gradient and of the gradient times x^, over each group of examples.

        Returns:
          It in the dtype of x^, computed in float32 or wider; where x^ is the map itself, what was given.
        """
        if self.epsilon is None:
            return gradient.astype(normalized.dtype)
        kind = wide(gradient.dtype)
        count = gradient.size // gradient.shape[-1] // self.moments.variance.shape[0]
        terms = self._terms(sums, count, self.epsilon, kind)
        factor, of_mean, of_values = (per_example(term, gradient.shape[0]) for term in terms)
        found = (gradient.astype(kind) - of_mean - normalized.astype(kind) * of_values) * factor
        return found.astype(normalized.dtype)

    def factors(self, sums: tuple[Array, Array], count: int) -> Float[Array, "g 3 c"]:
        """Of the gradient of x^ and of x^, and a constant: what makes `gradient` of them.

        Args:
          sums: as for `gradient`.
          count: of a group's examples and positions.
        """
        if self.epsilon is None:
            one = jnp.ones_like(sums[0])
            return jnp.stack((one, 0 * one, 0 * one), axis=1)
        kind = wide(self.moments.variance.dtype)
        factor, of_mean, of_values = self._terms(sums, count, self.epsilon, kind)
        return jnp.stack((factor, -of_values * factor, -of_mean * factor), axis=1)

    def mean_and_reciprocal(self) -> tuple[Array, Array]:
        """What makes x^ of the map: its mean, and 1 / deviation."""
        mean, variance = self.moments
        if self.epsilon is None:
            return jnp.zeros_like(mean), jnp.ones_like(mean)
        return mean, 1 / jnp.sqrt(variance + self.epsilon)

    def _terms(
        self, sums: tuple[Array, Array], count: int, epsilon: float, kind: jnp.dtype
    ) -> tuple[Array, Array, Array]:
        """1 / deviation, and the means over a group of the gradient and of the gradient times x^."""
        deviation = jnp.sqrt(self.moments.variance.astype(kind) + epsilon)
        of_mean, of_values = sums
        if self.of_moments is not None:
            of_mean = of_mean - self.of_moments.mean * deviation
            of_values = of_values - 2 * self.of_moments.variance * deviation**2
        return 1 / deviation, of_mean / count, of_values / count


def norm_of(
    x: Float[Array, "b h w c"], options: NormOptions, shift: Array | None, moments: Moments | None = None
) -> Normalization:
    """How a map becomes x^.

    Args:
      x: the map.
      options: of its norms.
      shift: float[c] near the mean, that moments are taken about; None: the norms are frozen, x^ is the map itself, and
        the moments are those that leave it alone.
      moments: of x, where they are known.
    """
    if shift is None:
        kind = wide(x.dtype)
        return Normalization(Moments(jnp.zeros((1, x.shape[-1]), kind), jnp.ones((1, x.shape[-1]), kind)), None)
    return Normalization(moments or batch_moments(x, options.group_size, shift), options.epsilon)
