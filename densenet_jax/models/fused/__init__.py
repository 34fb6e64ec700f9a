"""A faster implementation of the same networks, which `create_model` picks by default.

**Why it is the same function.** In a dense block a feature map x is read by every later layer, each through a batch
norm of its own: relu(scale * x_hat + bias) with x_hat = (x - mean) / sqrt(var + epsilon). In training all these norms
compute the same mean and var, those of x; only scale and bias belong to the layer that reads. So each feature map is
normalized once, when it is made, and only x_hat is kept. A layer computes relu(scale * x_hat + bias) and convolves it
("norm_relu_conv"); the raw x = x_hat * sqrt(var + epsilon) + mean is made only for a pyramid of features.

**Its derivative** is written by hand (`jax.custom_vjp`). With g the gradient of x_hat and the means over the batch,

    grad_x = (g - mean(g) - x_hat * mean(g * x_hat)) / sqrt(var + epsilon)

is linear in g, so that the gradients g of all layers that read x add up first, and the norm's derivative is applied
once. The output of the ReLU is recomputed from x_hat, not stored: memory grows linearly with depth, for which
1707.06990 pays a second forward pass. The sums need no pass of their own either. For one layer that reads x_hat, with
h the gradient before its ReLU, g = scale * h, grad_bias = sum(h) and grad_scale = sum(h * x_hat), so that

    sum(g) = scale * grad_bias        sum(g * x_hat) = scale * grad_scale.

A frozen norm, in evaluation every norm, normalizes by its running statistics: these are folded into scale and bias, and
x_hat is x. Over several devices the statistics of each feature map are reduced once.

A stage of a Dual Path Network is computed likewise: its dense path only grows, its residual path is another sum, and
so another x_hat, after each block. In the stem the maximum is taken before the norm, in transitions the average before
the convolution (`pooling`).

**How it is computed** is a `Backend`: XLA's operations, replaced where they are faster by the CPU's compiled kernels or
by Pallas kernels for GPUs and TPUs. Backends never change the function, beyond rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import jax
from jax.sharding import Mesh
from jaxtyping import Array, Float

from densenet_jax.models.densenet import BlockOptions, DenseLayer
from densenet_jax.models.dual_path import DualPathBlock, Plain
from densenet_jax.models.fused.backend import Backend
from densenet_jax.models.fused.backend_cpu import CpuBackend
from densenet_jax.models.fused.backend_gpu import GpuBackend
from densenet_jax.models.fused.backend_tpu import TpuBackend
from densenet_jax.models.fused.dense_block import fused_dense_block
from densenet_jax.models.fused.dual_path import fused_stage
from densenet_jax.models.fused.inference import (
    evaluate_dense_block,
    evaluate_stage,
    evaluate_stem,
    evaluate_transition,
)
from densenet_jax.models.fused.norm_relu_conv import NormReluConv
from densenet_jax.models.fused.pooling import conv_norm_relu_max_pool, norm_relu_conv_pool
from densenet_jax.models.layers import (
    BatchNorm,
    Convolution,
    FeatureMap,
    average_pool,
    blur_pool,
    dropout,
    max_pool,
)

BACKENDS: dict[str, type[Backend]] = {"cpu": CpuBackend, "tpu": TpuBackend, "gpu": GpuBackend}


@dataclass(frozen=True)
class Fused(Plain):
    """Computes stem, dense block, transition and stage faster than `Plain`, up to rounding the same.

    Attributes:
        platform: a key of BACKENDS; "" is the platform that JAX runs on.
        kernels: "auto", "xla" or "pallas" as for `create_model`, or "interpret" for tests of the kernels.
        mesh: divides the batch; None is JAX's one device, or unknown.
        is_packed: the variables are those of `inference.pack_kernels`.
        rounds: evaluates the stem by products of bfloat16 values, see there.
        int8: evaluates by products of integers on a CPU that has them, see there.
    """

    platform: str = ""
    kernels: str = "auto"
    mesh: Mesh | None = None
    is_packed: bool = False
    rounds: bool = False
    int8: bool = False

    @property
    def evaluates_by_cpu_kernels(self) -> bool:
        """Whether the CPU kernels evaluate whole blocks, where they are available."""
        return isinstance(self.backend, CpuBackend)

    @property
    def backend(self) -> Backend:
        """Makes the platform's backend; any platform without one is treated as a GPU."""
        return BACKENDS.get(self.platform or jax.default_backend(), GpuBackend)(self.mesh, self.kernels)

    def stem(
        self,
        layers: Sequence[tuple[Convolution, BatchNorm | None]],
        x: Float[Array, "b h w c"],
        train: bool,
        activation: Callable[[Array], Array],
        blur: bool = False,
        keep: bool = False,
    ) -> tuple[Float[Array, "b h1 w1 c2"] | None, Float[Array, "b h2 w2 c2"]]:
        """Computes `Plain.stem`; a maximum behind a ReLU, which is monotone, is taken before norm and ReLU."""
        backend = self.backend
        is_movable = activation is jax.nn.relu and not blur and not keep
        for index, (convolution, norm) in enumerate(layers):
            if norm is not None and index + 1 == len(layers) and is_movable:
                y = evaluate_stem(norm, convolution, x) if self.rounds and not train else None
                return None, conv_norm_relu_max_pool(convolution, norm, x, train, backend) if y is None else y
            x = backend.convolve_stem(x.astype(convolution.dtype), convolution.kernel, convolution.stride)
            if norm is None:
                return None, x
            x, is_folded = activation(norm(x, train)), norm.options.folded
        stride = 1 if blur else 2
        pooled = max_pool(x, stride, repeat_border=True) if is_folded else backend.max_pool(x, stride)
        return x if keep else None, blur_pool(pooled) if blur else pooled

    def dense_block(
        self,
        layers: Sequence[DenseLayer],
        x: Float[Array, "b h w c"],
        train: bool,
        key: Array | None,
        options: BlockOptions,
    ) -> FeatureMap:
        """Computes `Plain.dense_block` with each feature map normalized once."""
        features, backend = None, self.backend
        if not train and self.evaluates_by_cpu_kernels:
            values = evaluate_dense_block(layers, x, options, is_packed=self.is_packed)
            if values is not None:
                return FeatureMap(values)
        if not options.norm.folded:
            if not train and backend.kernels == "pallas":
                backend = replace(backend, kernels="auto")  # missing kernels are an error in training only
            features = fused_dense_block(layers, x, train, key, options, backend)
        return features or super().dense_block(layers, x, train, key, options)

    def transition(
        self,
        norm: BatchNorm,
        convolution: Convolution,
        x: FeatureMap,
        train: bool,
        blur: bool = False,
        rate: float = 0.0,
        key: Array | None = None,
    ) -> Float[Array, "b h2 w2 c2"]:
        """Computes `Plain.transition` with the pooling before the convolution, or in it."""
        if not train and not blur and self.evaluates_by_cpu_kernels:
            values = evaluate_transition(norm, convolution, x.raw(norm.options.epsilon), is_packed=self.is_packed)
            if values is not None:
                return values
        backend, pool, dtype = self.backend, blur_pool if blur else average_pool, convolution.dtype
        if key is not None:
            y = backend.convolve(jax.nn.relu(norm(x, train)).astype(dtype), convolution.kernel)
            return pool(dropout(y, rate, key))
        if blur or norm.options.folded:
            return backend.convolve(pool(jax.nn.relu(norm(x, train))).astype(dtype), convolution.kernel)
        values, scale, bias = norm.affine(x, train)
        assert scale is not None  # only a norm behind a convolution has none
        return norm_relu_conv_pool(values.astype(dtype), NormReluConv(scale, bias, convolution.kernel), backend)

    def stage(self, blocks: Sequence[DualPathBlock], x: FeatureMap, train: bool, remat: bool) -> FeatureMap:
        """Computes `Plain.stage` with each feature map normalized once."""
        features, backend, options = None, self.backend, blocks[0].norm_options
        if not train and self.evaluates_by_cpu_kernels:
            values = evaluate_stage(blocks, x.raw(options.epsilon), is_packed=self.is_packed)
            if values is not None:
                return FeatureMap(values)
        if not options.folded:
            features = fused_stage(blocks, x, train, remat, backend)
        return features or super().stage(blocks, x, train, remat)
