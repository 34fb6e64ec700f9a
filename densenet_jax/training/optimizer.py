"""Optimizers by name as optax chains, and the parameters that weight decay, freezing and rate factors touch.

- "sgd" as in torch: weight decay is added to the gradient, momentum accumulates it without dampening, and the rate
  multiplies the result, so that the buffer knows nothing of the rate.
- "adamw": decay beside the adaptive step (arXiv:1711.05101), multiplied by the rate as in torch.
- "lamb": adamw's step scaled per parameter by its norm over the step's (arXiv:1904.00962); parameters that weight decay
  spares are spared the scaling as well.
- "rmsprop" as in torch: decay is added to the gradient, epsilon stands outside the root, momentum accumulates the
  scaled gradient.

A parameter pattern is a regular expression searched in each path that `flax.traverse_util.flatten_dict(..., sep="/")`
gives, collection first: `params/denseblock1/denselayer1/norm1/scale`. `^params/(?!classifier)` names all but the
classifier.
"""

import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax

from densenet_jax.errors import UserError
from densenet_jax.training.schedules import Schedule

_LAYER = re.compile(r"params/(?:denseblock(\d+)/denselayer(\d+)|conv([2-5])_(\d+)|stage(\d+))/")
_TRANSITION = re.compile(r"params/transition(\d+)/")
_STEM = re.compile(r"params/(?:conv[0-2]|norm[0-2]|conv1_1/\w+|stem/\w+)/\w+$")
_USUAL_EPSILON = {"adamw": 1e-8, "lamb": 1e-6, "rmsprop": 1e-8}


def decay_mask(params: Any, decay_norm_and_bias: bool) -> Any:
    """Returns a tree that is True for each parameter that weight decay touches.

    `decay_norm_and_bias` False spares whatever is named "scale" or "bias" or has fewer than two axes.
    """

    def touched(path: tuple[Any, ...], leaf: Any) -> bool:
        return decay_norm_and_bias or (path[-1].key not in ("scale", "bias") and len(leaf.shape) >= 2)

    return jax.tree_util.tree_map_with_path(touched, params)


def _names(params: Any) -> Any:
    """Returns a tree of the parameters' names, such as "params/norm0/scale"."""
    separated = functools.partial(jax.tree_util.keystr, simple=True, separator="/")
    return jax.tree_util.tree_map_with_path(lambda path, _: f"params/{separated(path)}", params)


def frozen_mask(params: Any, pattern: str) -> Any:
    """Returns a tree that is True for each parameter that `pattern` freezes.

    Raises:
        UserError: it matches no parameter or all of them.
    """
    key, names = "config.optim.freeze", _names(params)
    mask = jax.tree.map(lambda name: bool(re.search(pattern, name)), names)
    flags = jax.tree.leaves(mask)
    if not 0 < sum(flags) < len(flags):
        raise UserError(
            f"{key} is {pattern!r}, which matches {sum(flags)} of {len(flags)} parameters; expected some, but not all; "
            f"a parameter is called, for example, {jax.tree.leaves(names)[0]}."
        )
    return mask


def rate_factors(params: Any, multipliers: Sequence[tuple[str, float]]) -> Any:
    """Returns a tree of each parameter's learning-rate factor: the first pattern that matches counts, else 1.

    Raises:
        UserError: a pattern matches no parameter.
    """
    key, names = "config.optim.rate_multipliers", _names(params)
    for pattern, _ in multipliers:
        if not any(map(re.compile(pattern).search, jax.tree.leaves(names))):
            raise UserError(
                f"{key} has {pattern!r}, which matches no parameter; "
                f"a parameter is called, for example, {jax.tree.leaves(names)[0]}."
            )
    return jax.tree.map(
        lambda name: next((factor for pattern, factor in multipliers if re.search(pattern, name)), 1.0), names
    )


def layer_factors(params: Any, decay: float) -> Any:
    """Returns a tree of each parameter's learning-rate factor: decay to the power of the layers behind its own.

    Layers are the stem, each dense layer (with a block's last goes the transition behind it), each block of a dual path
    network, each stage of an RDNet, and the head with its norm, whose factor is 1; as timm's --layer-decay.
    """

    def layer_of(name: str) -> tuple[float, float]:
        if match := _LAYER.match(name):
            block, layer = [*filter(None, match.groups()), 0][:2]
            return float(block), float(layer)
        if match := _TRANSITION.match(name):
            layers = params[f"denseblock{match[1]}"]
            return float(match[1]), float(sum(part.startswith("denselayer") for part in layers))
        return (0.0, 0.0) if _STEM.match(name) else (math.inf, 0.0)

    names = _names(params)
    order = sorted(set(map(layer_of, jax.tree.leaves(names))), reverse=True)
    return jax.tree.map(lambda name: decay ** order.index(layer_of(name)), names)


def make_optimizer(
    name: str,
    schedule: Schedule,
    *,
    momentum: float = 0.9,
    nesterov: bool = True,
    weight_decay: float = 0.0,
    decay_norm_and_bias: bool = True,
    clip_grad_norm: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    rms_decay: float = 0.9,
    epsilon: float = 0.0,
    freeze: str = "",
    rate_multipliers: Sequence[tuple[str, float]] = (),
    layer_decay: float = 1.0,
) -> optax.GradientTransformation:
    """Builds one of `choices.OPTIMIZERS`; its state has the parameters' dtype, and the schedule counts its updates.

    Args:
        momentum: for sgd and rmsprop, in [0, 1); 0 keeps no buffer.
        decay_norm_and_bias: False spares batch-norm scales and all biases.
        clip_grad_norm: the gradient's norm over all parameters that move is cut to this first; 0 leaves it.
        betas: kept shares of adamw's and lamb's first and second moments.
        rms_decay: kept share of rmsprop's squared gradient.
        epsilon: 0 takes the usual 1e-8 (adamw, rmsprop) or 1e-6 (lamb).
        freeze: pattern of parameters that are frozen, see the module; they do not decay either.
        rate_multipliers: (pattern, learning-rate factor) pairs.
        layer_decay: see `layer_factors`; 1 leaves all rates as they are.

    Raises:
        UserError: from the optimizer's init, a pattern fits no parameter.
    """
    epsilon, nothing = epsilon or _USUAL_EPSILON.get(name, 0.0), optax.identity()
    mask = functools.partial(decay_mask, decay_norm_and_bias=decay_norm_and_bias)
    decay = optax.add_decayed_weights(weight_decay, mask) if weight_decay else nothing
    trace = optax.trace(momentum, nesterov and name == "sgd") if momentum else nothing
    body = {
        "sgd": [decay, trace],
        "rmsprop": [decay, optax.scale_by_rms(rms_decay, epsilon, eps_in_sqrt=False), trace],
        "adamw": [optax.scale_by_adam(*betas, epsilon), decay],
        "lamb": [optax.scale_by_adam(*betas, epsilon), decay, optax.masked(optax.scale_by_trust_ratio(), mask)],
    }[name]
    # Zeroing comes twice: first, so that frozen gradients count in no norm; last, because of weight decay.
    frozen = functools.partial(frozen_mask, pattern=freeze)
    zero_frozen = optax.masked(optax.set_to_zero(), frozen) if freeze else nothing
    clip = optax.clip_by_global_norm(clip_grad_norm) if clip_grad_norm else nothing
    factors = functools.partial(rate_factors, multipliers=rate_multipliers)
    scaled = [_scale_by_tree(factors) if rate_multipliers else nothing]
    if layer_decay != 1.0:
        scaled.append(_scale_by_tree(functools.partial(layer_factors, decay=layer_decay)))
    return optax.chain(zero_frozen, clip, *body, optax.scale_by_learning_rate(schedule), *scaled, zero_frozen)


def _scale_by_tree(factors_of: Callable[[Any], Any]) -> optax.GradientTransformation:
    def init(params: optax.Params) -> optax.EmptyState:
        factors_of(params)  # which checks its patterns
        return optax.EmptyState()

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        return jax.tree.map(lambda update, factor: update * factor, updates, factors_of(updates)), state

    return optax.GradientTransformation(init, update)
