"""Folds batch norms for inference: running statistics become part of a convolution, or a scale and a bias.

A norm that alone reads a convolution's output goes into that convolution: its scale into the kernel, the rest into a
bias, under the norm's name. These are the norms of the stems (not the CIFAR stem, which has none), `norm2` of a dense
layer with a bottleneck, and `c3x3_b/bn` and `c1x1_c/bn` of a dual-path block.

Every other norm reads a concatenation or a sum that other layers read as well: it becomes one precomputed scale and
bias a channel.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from flax import traverse_util

# Paths of a convolution and of the only norm that reads its output.
_FOLLOWED_BY = (
    (r"conv(\d)", r"norm\1"),
    (r"(.*denselayer\d+)/conv1", r"\1/norm2"),
    (r"conv1_1/conv", r"conv1_1/bn"),
    (r"(conv\d_\d+)/c1x1_a/conv", r"\1/c3x3_b/bn"),
    (r"(conv\d_\d+)/c3x3_b/conv", r"\1/c1x1_c/bn"),
)


def fold_batch_norm(module: nn.Module, variables: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """Returns a copy of the network for inference only, with every batch norm folded in float64.

    Its variables, {"params"} alone, keep the parameters' dtypes; the given ones are left as they are. A network without
    batch norms (RDNet) has nothing to fold.
    """
    if not variables.get("batch_stats"):
        return module.clone(remat=False), {"params": variables["params"]}
    options = module.norm_options
    params, stats = (traverse_util.flatten_dict(dict(variables[kind]), sep="/") for kind in ("params", "batch_stats"))
    scales, folded = dict[str, np.ndarray](), dict[str, Any](params)
    for norm in (name.removesuffix("/mean") for name in stats if name.endswith("/mean")):
        mean, variance = (np.asarray(stats[f"{norm}/{kind}"], np.float64) for kind in ("mean", "var"))
        scales[norm] = np.asarray(params[f"{norm}/scale"], np.float64) / np.sqrt(variance + options.epsilon)
        folded[f"{norm}/scale"] = scales[norm]
        folded[f"{norm}/bias"] = np.asarray(params[f"{norm}/bias"], np.float64) - mean * scales[norm]
    for name in params:
        if (norm := _norm_after(name)) in scales:
            kernel = np.asarray(params[name], np.float64) * scales[norm]
            folded[name] = np.asarray(kernel, params[name].dtype)
            del folded[f"{norm}/scale"]
    # `jnp.asarray` would compile a program for every shape.
    arrays = jax.device_put(
        {name: np.asarray(value, params[name].dtype) for name, value in folded.items()}, may_alias=False
    )
    plain = module.clone(norm_options=dataclasses.replace(options, folded=True), remat=False)
    return plain, {"params": traverse_util.unflatten_dict(arrays, sep="/")}


def _norm_after(kernel: str) -> str | None:
    for convolution, norm in _FOLLOWED_BY:
        if match := re.fullmatch(f"{convolution}/kernel", kernel):
            return match.expand(norm)
    return None
