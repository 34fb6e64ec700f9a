"""A stage of a Dual Path Network in training, each map normalized once; `dual_path_arithmetic` computes it.

The function is that of the blocks in `dual_path`, called one after the other, up to rounding.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from densenet_jax.models.arithmetic import ARITHMETIC, arithmetic_for
from densenet_jax.models.dual_path_arithmetic import Block, Facts, Maps, joined, stage
from densenet_jax.models.dual_path_stage import (
    BlockArrays,
    BlockMoments,
    NormReader,
    StageForm,
    StageOptions,
    StageResult,
)
from densenet_jax.models.layers import FeatureMap, Moments, NormOptions, fold_running
from densenet_jax.models.normalization import Normalization, norm_of
from densenet_jax.models.readers import Reader, sums_of_gradient
from densenet_jax.models.split_readers import MultiReader


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _normalize_map(options: NormOptions, x: Array, shift: Array) -> tuple[Array, Moments]:
    """x^ in x's dtype and the moments of x; x^ is all that is kept."""
    norm = norm_of(x, options, shift)
    return norm.apply(x), norm.moments


def _normalize_map_forward(options: NormOptions, x: Array, shift: Array) -> Any:
    out = _normalize_map(options, x, shift)
    return out, out


def _normalize_map_backward(options: NormOptions, saved: tuple[Array, Moments], cotangents: Any) -> Any:
    (normalized, moments), (gradient, of_moments) = saved, cotangents
    sums = sums_of_gradient(gradient, normalized, moments.mean.shape[0])
    return Normalization(moments, options.epsilon, of_moments).gradient(gradient, normalized, sums), None


_normalize_map.defvjp(_normalize_map_forward, _normalize_map_backward)


def path_norms_agree(blocks: Sequence[BlockArrays]) -> bool:
    """Whether the norms that read the two paths are all frozen or none: else a map has two kinds of statistics."""
    readers = [reader for block in blocks for reader in (block.first, block.projection) if reader is not None]
    return len({reader.norm.frozen for reader in readers}) == 1


def normalize_once_stage(
    inputs: FeatureMap, blocks: Sequence[BlockArrays], options: StageOptions, platform: str = ""
) -> StageResult:
    """A stage in training, in its normalize-once form.

    Args:
      inputs: both paths of the stage before, or the stem's map.
      blocks: their arrays, for which `path_norms_agree`; the first has a projection.
      options: of the stage.
      platform: a key of ARITHMETIC; "" is the platform JAX runs on.
    """
    facts, are_frozen = Facts(options, arithmetic_for(platform)), blocks[0].first.norm.frozen
    x, moments = inputs
    if are_frozen:
        x = inputs.raw(options.norm.epsilon).astype(options.dtype)
    elif moments is None:
        x, moments = _normalize_map(options.norm, x.astype(options.dtype), blocks[0].first.norm.mean)
    outputs = stage(facts, x, tuple(_readers(block, options.norm) for block in blocks), _shifts(blocks))
    seen = jax.lax.stop_gradient(outputs.seen)
    features = FeatureMap(outputs.values, None if are_frozen else outputs.moments)
    return StageResult(features, tuple(_moments(blocks, moments, seen, index) for index in range(len(blocks))))


def _readers(block: BlockArrays, options: NormOptions) -> Block:
    def multi(reader: NormReader) -> MultiReader:
        norm = reader.norm
        scale, bias = fold_running(norm, options.epsilon) if norm.frozen else (norm.scale, norm.bias)
        return MultiReader(scale, bias, reader.kernels)

    def single(reader: NormReader) -> Reader:
        found = multi(reader)
        return Reader(found.scale, found.bias, found.kernels[0])

    projection = None if block.projection is None else single(block.projection)
    return Block(multi(block.first), single(block.second), multi(block.third), projection)


def _shifts(blocks: Sequence[BlockArrays]) -> Maps:
    """Running means: of the paths after a block by the next one's; the last block's are read elsewhere.

    None of maps whose norms are frozen.
    """
    second, third = (
        tuple(None if norm.frozen else norm.mean for norm in norms)
        for norms in ([block.second.norm for block in blocks], [block.third.norm for block in blocks])
    )
    if blocks[0].first.norm.frozen:
        return Maps(second, third, (None,) * len(blocks), (None,) * len(blocks))
    width, new = (kernel.shape[-1] for kernel in blocks[0].third.kernels)
    after = [block.first.norm.mean for block in blocks[1:]]
    projection = blocks[0].projection
    first = new + (0 if projection is None else projection.kernels[0].shape[-1] - width)
    dense = [mean[-(new if index else first) :] for index, mean in enumerate(after)]
    last = jnp.zeros_like(blocks[0].first.norm.mean, shape=(new if after else first,))
    residual = (*(mean[:width] for mean in after), after[-1][:width] if after else jnp.zeros_like(last, shape=(width,)))
    return Maps(second, third, residual, (*dense, last))


def _moments(blocks: Sequence[BlockArrays], inputs: Moments | None, seen: Maps, index: int) -> BlockMoments:
    """Those that a block's norms take in, None of what is frozen; inputs are those of what the first block reads."""
    block = blocks[index]
    first = joined([seen.residual[index - 1], *seen.dense[:index]]) if index else inputs
    found = (first, seen.second[index], seen.third[index], None if index else inputs)
    norms = (block.first.norm, block.second.norm, block.third.norm, block.first.norm)
    return BlockMoments(*(None if norm.frozen else own for norm, own in zip(norms, found, strict=True)))


STAGE_FORMS: dict[str, StageForm | None] = {
    "normalize_once": normalize_once_stage,
    **{f"normalize_once_{name}": functools.partial(normalize_once_stage, platform=name) for name in ARITHMETIC},
    "plain": None,  # each block for itself, as `dual_path` has it
}
