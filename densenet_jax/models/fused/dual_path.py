"""A stage of a Dual Path Network, computed by `dual_path_vjp` from the parameters of its blocks."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from densenet_jax.models.dual_path import DualPathBlock
from densenet_jax.models.fused.backend import Backend
from densenet_jax.models.fused.dual_path_arrays import Block, Config, Outputs, PerMap
from densenet_jax.models.fused.dual_path_vjp import stage
from densenet_jax.models.fused.norm import Normalization, concatenate_stats, make_normalization
from densenet_jax.models.fused.norm_relu_conv import NormReluConv, scale_and_bias, sum_gradient
from densenet_jax.models.fused.split import SplitConv
from densenet_jax.models.layers import BatchNorm, BatchStats, FeatureMap, NormArrays, NormOptions


class BlockNorms(NamedTuple):
    """The norms of one block; only a stage's first block has a projection."""

    first: NormArrays
    second: NormArrays
    third: NormArrays
    projection: NormArrays | None


def fused_stage(
    blocks: Sequence[DualPathBlock], x: FeatureMap, train: bool, remat: bool, backend: Backend
) -> FeatureMap | None:
    """Computes `dual_path.Plain.stage` with each feature map normalized once.

    Returns None where that is not possible or gains nothing: if some norms that read the two paths are frozen and
    others are not, since a feature map would have two kinds of statistics; in evaluation unless kernels read a buffer.
    """
    options, dtype = blocks[0].norm_options, blocks[0].dtype
    norms = [_norms(block, train) for block in blocks]
    if not train and not backend.reads_buffer(x.values.astype(dtype), blocks[0].c1x1_a.conv.kernel):
        return None
    are_frozen = norms[0].first.frozen
    if any(norm.frozen != are_frozen for own in norms for norm in (own.first, own.projection) if norm is not None):
        return None
    arrays = tuple(_arrays(block, own, options) for block, own in zip(blocks, norms, strict=True))
    values, stats = x
    if are_frozen:
        values = x.raw(options.epsilon).astype(dtype)
    elif stats is None:
        values, stats = _normalize(options, values.astype(dtype), norms[0].first.mean)
    config = Config(options, blocks[0].residual_width, blocks[0].groups, blocks[0].stride, remat, backend)
    outputs = stage(config, values, arrays, _shifts(config, norms, arrays))
    if train:
        _update_running(blocks, norms, stats, outputs, x.values.size // x.values.shape[-1])
    return FeatureMap(outputs.values, None if are_frozen else outputs.stats)


def _norms(block: DualPathBlock, train: bool) -> BlockNorms:
    """Returns the block's norms, in evaluation all of them frozen."""

    def arrays(module: BatchNorm) -> NormArrays:
        return replace(module.arrays(), frozen=not train or module.is_frozen())

    first, second, third, projection = _norm_modules(block)
    return BlockNorms(arrays(first), arrays(second), arrays(third), None if projection is None else arrays(projection))


def _norm_modules(block: DualPathBlock) -> tuple[BatchNorm, BatchNorm, BatchNorm, BatchNorm | None]:
    projection = block.projection()
    return block.c1x1_a.bn, block.c3x3_b.bn, block.c1x1_c.bn, None if projection is None else projection.bn


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _normalize(options: NormOptions, x: Array, shift: Array) -> tuple[Array, BatchStats]:
    """Returns x_hat in x's dtype and x's statistics; only x_hat is kept for the backward pass."""
    norm = make_normalization(x, options, shift)
    return norm.apply(x), norm.stats


def _normalize_forward(options: NormOptions, x: Array, shift: Array) -> Any:
    out = _normalize(options, x, shift)
    return out, out


def _normalize_backward(options: NormOptions, saved: tuple[Array, BatchStats], cotangents: Any) -> Any:
    (x_hat, stats), (gradient, grad_stats) = saved, cotangents
    sums = sum_gradient(gradient, x_hat, stats.mean.shape[0])
    return Normalization(stats, options.epsilon, grad_stats).gradient(gradient, x_hat, sums), None


_normalize.defvjp(_normalize_forward, _normalize_backward)


def _arrays(block: DualPathBlock, norms: BlockNorms, options: NormOptions) -> Block:
    first, second, third = (scale_and_bias(norm, options) for norm in norms[:3])
    kernels = (block.c1x1_c1.kernel, block.c1x1_c2.kernel) if block.split_projection else (block.c1x1_c.conv.kernel,)
    projection, module = None, block.projection()
    if module is not None and norms.projection is not None:
        projection = NormReluConv(*scale_and_bias(norms.projection, options), module.conv.kernel)
    return Block(
        SplitConv(*first, (block.c1x1_a.conv.kernel,)),
        NormReluConv(*second, block.c3x3_b.conv.kernel),
        SplitConv(*third, kernels),
        projection,
    )


def _shifts(config: Config, norms: Sequence[BlockNorms], blocks: Sequence[Block]) -> PerMap:
    """Takes the running means of the paths after a block from the next block; no block reads the last ones."""
    second, third = (
        tuple(None if norm.frozen else norm.mean for norm in kind)
        for kind in ([own.second for own in norms], [own.third for own in norms])
    )
    if norms[0].first.frozen:
        return PerMap(second, third, (None,) * len(norms), (None,) * len(norms))
    width, ends = config.residual_width, config.dense_ends(blocks)
    after = [own.first.mean for own in norms[1:]]
    starts = [0, *ends]
    dense = [mean[width + start :] for start, mean in zip(starts, after, strict=False)]
    last = jnp.zeros_like(norms[0].first.mean, shape=(ends[-1] - starts[-2],))
    residual = (*(mean[:width] for mean in after), after[-1][:width] if after else jnp.zeros_like(last, shape=(width,)))
    return PerMap(second, third, residual, (*dense, last))


def _update_running(
    blocks: Sequence[DualPathBlock],
    norms: Sequence[BlockNorms],
    inputs: BatchStats | None,
    outputs: Outputs,
    positions: int,
) -> None:
    """Updates every norm that is not frozen; inputs are the statistics of the first block's input."""
    stats, after = outputs.all_stats, outputs.values.size // outputs.values.shape[-1]
    read = [
        concatenate_stats([stats.residual[index - 1], *stats.dense[:index]]) if index else inputs
        for index in range(len(blocks))
    ]
    for index, (block, own) in enumerate(zip(blocks, norms, strict=True)):
        before = after if index else positions
        first, second, third, projection = _norm_modules(block)
        for module, norm, new, count in (
            (first, own.first, read[index], before),
            (second, own.second, stats.second[index], before),
            (projection, own.projection, read[index], before),
            (third, own.third, stats.third[index], after),
        ):
            if module is not None and norm is not None and not norm.frozen:
                module.update_running(new, count)
