"""Makes a network from its name; the only place that picks the plain or the fused implementation."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh

from densenet_jax.choices import KERNELS_WANTED
from densenet_jax.dtypes import DType
from densenet_jax.errors import UserError
from densenet_jax.kernels.select import KERNEL_DTYPES
from densenet_jax.models import rdnet
from densenet_jax.models.densenet import STEMS, DenseNet
from densenet_jax.models.dual_path import ACTIVATIONS, PLAIN, DualPathNetwork, Plain
from densenet_jax.models.fused import BACKENDS, Fused
from densenet_jax.models.fused.rdnet import FusedRDNet
from densenet_jax.models.head import GLOBAL_POOLS, HeadOptions, check_output
from densenet_jax.models.layers import NormOptions
from densenet_jax.models.variants import (
    Architecture,
    DenseNetArchitecture,
    DualPathArchitecture,
    RDNetArchitecture,
    get_variant,
    list_models,
)

__all__ = ["create_model", "list_models"]

_CHOICES = {
    "stem": STEMS,
    "global_pool": GLOBAL_POOLS,
    "blur": ("none", "stem", "all"),
    "init_fan": ("fan_in", "fan_out"),
    "block_form": ("normalize_once", *(f"normalize_once_{platform}" for platform in BACKENDS), "plain"),
    "kernels": KERNELS_WANTED,
    "activation": tuple(ACTIVATIONS),
}


def create_model(
    name: str,
    *,
    num_classes: int | None = None,
    dtype: DType = jnp.float32,
    param_dtype: DType = jnp.float32,
    classifier_dropout: float = 0.0,
    layer_dropout: float = 0.0,
    drop_path_rate: float = 0.0,
    dropout_every_convolution: bool = True,
    output: str | Sequence[int] = "logits",
    global_pool: str = "avg",
    test_time_pool_px: int = 0,
    remat: bool = False,
    batch_norm_momentum: float = 0.9,
    batch_norm_epsilon: float | None = None,
    batch_norm_group_size: int = 0,
    unbiased_running_variance: bool = True,
    frozen_norms: str = "",
    block_form: str = "normalize_once",
    kernels: str = "auto",
    mesh: Mesh | None = None,
    **architecture: Any,
) -> nn.Module:
    """Makes a network of the variants table, a flax linen module, from its name.

    `module.init(key, images)` gives {"params", "batch_stats"}, of an RDNet {"params"}; `module.apply(variables, images,
    train=False)` gives logits float32[b, num_classes] of normalized images float[b, h, w, c]. Training: `train=True,
    mutable=["batch_stats"]`, and `rngs={"dropout": key, "drop_path": key}` where such a rate is set.

    Args:
        name: one of `list_models()`.
        num_classes: None is the variant's own, as for batch_norm_epsilon.
        dtype: of activations and convolutions; statistics are float32 or wider. int8 is float32, and evaluated by
            products of integers where `models.fused.inference.pack_kernels` lays the kernels out for them.
        classifier_dropout: rate in [0, 1) between pooling and classifier.
        layer_dropout: rate in [0, 1) after convolutions (DenseNet), or after dense layers (RDNet).
        drop_path_rate: share in [0, 1) of examples for which the last dense layer adds zeros in training; it rises
            linearly from 0 at the first layer (stochastic depth, RDNet only).
        dropout_every_convolution: the paper's placement, after every convolution but the first; False is torchvision's,
            after each dense layer's last.
        output: "logits", "pooled" float[b, c], "map" float[b, h, w, c], or "pyramid", {stride: features} of all stages;
            or the strides of the feature maps to return, such as (2, 8), of which 2 is the stem's before its pooling.
        global_pool: what the classifier is given: "avg", "max", "avgmax" (the mean of both), or "catavgmax" (both, one
            after the other, so that pooled features and the classifier are twice as wide).
        test_time_pool_px: in evaluation on images larger than the training's, classify every window of that side in
            the last feature map (7 in the references) and take the mean of the windows' average and maximum; 0 is off.
        remat: recompute cheap intermediate values in the backward pass to save memory.
        batch_norm_momentum: share of the old running statistic that an update keeps.
        batch_norm_group_size: examples that share batch statistics; 0 is the whole batch.
        unbiased_running_variance: torch's n-1 estimate in the running variance.
        frozen_norms: regular expression of the scales ("params/norm0/scale") whose batch norms use their running
            statistics in training too, and leave them as they are; for fine-tuning with a frozen body.
        block_form: the implementation: "normalize_once" (`densenet_jax.models.fused`), "plain" (the readable
            reference), or "normalize_once_tpu", "..._cpu", "..._gpu", for another platform; all are the same function.
        kernels: "pallas" trains dense blocks with kernels for GPUs, or for TPUs from v5 on, "xla" without them; "auto"
            takes those measured to be faster: on Hopper GPUs, in evaluation as well (DenseNet only).
        mesh: the devices that the model is for, with one axis that divides the batch: "auto" chooses by them, and
            kernels compute each device's part. None: JAX's own device, and no kernels if there are several.
        **architecture: overrides of the row's architecture, such as growth_rate=16 or block_sizes=(2, 2).

    Raises:
        UserError: an unknown name or override, or a value outside its range.
    """
    variant = get_variant(name)
    network = _override(name, variant.architecture, architecture)
    epsilon = network.epsilon if batch_norm_epsilon is None else batch_norm_epsilon
    num_classes = variant.num_classes if num_classes is None else num_classes
    try:
        re.compile(frozen_norms)
    except re.error as error:
        raise UserError(f"frozen_norms={frozen_norms!r}: expected a regular expression ({error})") from error
    _check_rates(classifier_dropout=classifier_dropout, layer_dropout=layer_dropout, drop_path_rate=drop_path_rate)
    _check_numbers(num_classes, batch_norm_momentum, epsilon, batch_norm_group_size, test_time_pool_px)
    _check_family(name, network, kernels, drop_path_rate, layer_dropout)
    if test_time_pool_px and global_pool != "avg":
        raise UserError(f"global_pool={global_pool!r}: expected 'avg' beside test_time_pool_px; set one of the two")
    pool = _chosen("global_pool", global_pool)
    by_int8 = dtype == jnp.int8
    dtype = jnp.float32 if by_int8 else dtype
    head = HeadOptions(num_classes, classifier_dropout, test_time_pool_px, dtype, param_dtype, pool)
    wanted = tuple(output) if isinstance(output, list) else output
    common: dict[str, Any] = {"head_options": head, "output": wanted, "remat": remat}
    common |= {"dtype": dtype, "param_dtype": param_dtype}
    implementation = _make_implementation(block_form, kernels, mesh, by_int8)
    module: DenseNet | DualPathNetwork | rdnet.RDNet
    if isinstance(network, RDNetArchitecture):  # layer norms only
        if by_int8:
            raise UserError(f"dtype=int8: {name} is an RDNet, which has no products of int8; set it to float32")
        if (batch_norm_epsilon, batch_norm_momentum, batch_norm_group_size) != (None, 0.9, 0):
            raise UserError(f"{name} has no batch norms: leave batch_norm_epsilon, _momentum and _group_size alone")
        parts = FusedRDNet(implementation.platform) if isinstance(implementation, Fused) else rdnet.PLAIN
        common |= {"layer_dropout": layer_dropout, "drop_path_rate": drop_path_rate, "implementation": parts}
        module = rdnet.RDNet(**vars(network), **common)
    else:
        running = (batch_norm_momentum, batch_norm_group_size, unbiased_running_variance, frozen_norms)
        common |= {"norm_options": NormOptions(epsilon, *running), "implementation": implementation}
        if isinstance(network, DenseNetArchitecture):
            common |= {"layer_dropout": layer_dropout, "dropout_every_convolution": dropout_every_convolution}
            module = DenseNet(network, **common)
        else:
            module = DualPathNetwork(network, **common)
    check_output(module.output, module.strides, name)
    return module


def _check_family(name: str, network: Architecture, kernels: str, drop_path_rate: float, layer_dropout: float) -> None:
    if kernels == "pallas" and not isinstance(network, DenseNetArchitecture):
        raise UserError(f"kernels='pallas': {name} has no dense blocks that kernels exist for; set it to 'auto'")
    if drop_path_rate and not isinstance(network, RDNetArchitecture):
        raise UserError(f"drop_path_rate={drop_path_rate}: {name} is no RDNet and drops no paths; set it to 0")
    if layer_dropout and isinstance(network, DualPathArchitecture):
        raise UserError(f"layer_dropout={layer_dropout}: {name} has none; use classifier_dropout, or set it to 0")


def _make_implementation(block_form: str, kernels: str, mesh: Mesh | None, by_int8: bool) -> Plain:
    platform = _chosen("block_form", block_form).removeprefix("normalize_once").removeprefix("_")
    if _chosen("kernels", kernels) == "pallas" and platform not in ("", *KERNEL_DTYPES):
        raise UserError(f"kernels='pallas' is for block_form='normalize_once', not {block_form!r}; set it to 'auto'")
    return PLAIN if platform == "plain" else Fused(platform, kernels, mesh, int8=by_int8)


def _override(name: str, row: Architecture, overrides: dict[str, Any]) -> Architecture:
    fields = dict(vars(row))
    for key, value in overrides.items():
        if key in ("channels", "in_channels", "in_chans"):
            raise UserError(
                f"create_model({name!r}) has no setting {key!r}: the module takes the channels of the images "
                "that it is initialized with; load_pretrained's channels= adapts weights"
            )
        if key not in fields:
            nearest = difflib.get_close_matches(key, fields, n=1) or [", ".join(fields)]
            raise UserError(f"create_model({name!r}) has no setting {key!r}: did you mean {nearest[0]}?")
        if key == "growth_rate" and isinstance(fields[key], tuple) and isinstance(value, int):
            value = (value,) * len(overrides.get("block_sizes", fields["block_sizes"]))  # RDNet: one for all stages
        fields[key] = tuple(value) if isinstance(fields[key], tuple) else _chosen(key, value)
    sizes, increments = fields["block_sizes"], fields.get("dense_increments")
    if not sizes or min(sizes) < 1:
        raise UserError(f"block_sizes={sizes}: expected at least one block, each of at least one layer")
    if increments is not None and len(increments) != len(sizes):
        raise UserError(f"block_sizes={sizes} and dense_increments={increments}: expected one increment a stage")
    rate = fields.get("growth_rate", 1)
    if min(rate if isinstance(rate, tuple) else (rate,), default=0) < 1:
        raise UserError(f"growth_rate={rate}: expected at least 1")
    if isinstance(rate, tuple) and len(rate) != len(sizes):
        raise UserError(f"block_sizes={sizes} and growth_rate={rate}: expected one growth rate a stage, or one number")
    if not 0 < fields.get("compression", 1) <= 1:
        raise UserError(f"compression={fields['compression']}: expected a share above 0, up to 1")
    return type(row)(**fields)


def _chosen(key: str, value: Any) -> Any:
    if key in _CHOICES and value not in _CHOICES[key]:
        raise UserError(f"{key}={value!r}: expected one of {', '.join(_CHOICES[key])}")
    return value


def _check_numbers(num_classes: int, momentum: float, epsilon: float, group_size: int, window_px: int) -> None:
    if num_classes < 1:
        raise UserError(f"num_classes={num_classes}: expected at least 1; for features without a head, output='pooled'")
    if not 0.0 <= momentum <= 1.0:
        raise UserError(f"batch_norm_momentum={momentum}: expected a share from 0 to 1")
    if epsilon <= 0:
        raise UserError(f"batch_norm_epsilon={epsilon}: expected more than 0")
    for key, value in (("batch_norm_group_size", group_size), ("test_time_pool_px", window_px)):
        if value < 0:
            raise UserError(f"{key}={value}: expected 0 (off) or more")


def _check_rates(**rates: float) -> None:
    for key, rate in rates.items():
        if not 0.0 <= rate < 1.0:
            raise UserError(f"{key}={rate}: expected a rate from 0 up to, but not including, 1")
