"""The derivative of normalising a map once, from the gradient of x^ to that of the map."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from densenet_jax.kernels.dtypes import wide
from densenet_jax.models.layers import Moments, per_example


class Normalisation(NamedTuple):
    """How maps became x^.

    Attributes:
      moments: of the maps.
      of_moments: the gradients of these, where something else reads them.
      epsilon: the norm's; None: x^ is the map itself.
    """

    moments: Moments
    of_moments: Moments
    epsilon: float | None

    def gradient(
        self, gradient: Float[Array, "b h w c"], normalised: Float[Array, "b h w c"], sums: tuple[Array, Array]
    ) -> Float[Array, "b h w c"]:
        """Of the maps: rstd * (gradient - mean(gradient) - x^ * mean(gradient * x^)), and what comes by the moments.

        Args:
          gradient: of x^.
          normalised: x^.
          sums: float[g, c], of the gradient and of the gradient times x^, over each group of examples.

        Returns:
          It in float32 or wider; where x^ is the map itself, what was given.
        """
        if self.epsilon is None:
            return gradient
        kind = wide(gradient.dtype)
        count = gradient.size // gradient.shape[-1] // self.moments.variance.shape[0]
        terms = self._terms(sums, count, self.epsilon, kind)
        factor, of_mean, of_values = (per_example(term, gradient.shape[0]) for term in terms)
        return (gradient.astype(kind) - of_mean - normalised.astype(kind) * of_values) * factor

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
        of_mean = (sums[0] - self.of_moments.mean * deviation) / count
        of_values = (sums[1] - 2 * self.of_moments.variance * deviation**2) / count
        return 1 / deviation, of_mean, of_values
