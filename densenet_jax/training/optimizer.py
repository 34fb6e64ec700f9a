"""Optimizers by name as optax chains, and the parameters that weight decay, freezing and rate factors touch.

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

from densenet_jax.choices import OPTIMIZERS
from densenet_jax.errors import UserError
from densenet_jax.training.schedules import Schedule

_FREEZE_KEY = "config.optim.freeze"
_LAYER = re.compile(r"(?:denseblock(\d+)/denselayer(\d+)|conv([2-5])_(\d+)|stage(\d+))(?:/|$)")
_TRANSITION = re.compile(r"transition(\d+)/")
_STEM = re.compile(r"(?:conv[0-2]|norm[0-2]|conv1_1/\w+|stem/\w+)$")
_USUAL_EPSILON = {"adamw": 1e-8, "lamb": 1e-6, "rmsprop": 1e-8}


def decay_mask(params: Any, decay_norm_and_bias: bool) -> Any:
    """Returns a tree that is True for each parameter that weight decay touches.

    `decay_norm_and_bias` False spares whatever is named "scale" or "bias" or has fewer than two axes.
    """

    def touched(path: tuple[Any, ...], leaf: Any) -> bool:
        return decay_norm_and_bias or (path[-1].key not in ("scale", "bias") and len(leaf.shape) >= 2)

    return jax.tree_util.tree_map_with_path(touched, params)


def path_name(path: tuple[Any, ...], collection: str = "params") -> str:
    """Joins a leaf's key path in a collection to its name."""
    return f"{collection}/{jax.tree_util.keystr(path, simple=True, separator='/')}"


def _compile(pattern: str, key: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(f"{key} is {pattern!r}, which is no regular expression ({error}).") from error


def _check_some_but_not_all(matched: int, total: int, pattern: str, example: str) -> None:
    if 0 < matched < total:
        return
    raise UserError(
        f"{_FREEZE_KEY} is {pattern!r}, which matches {matched} of {total} parameters; expected some, but not all; "
        f"a parameter is called, for example, {example}."
    )


def frozen_mask(params: Any, pattern: str) -> Any:
    """Returns a tree that is True for each parameter that `pattern` freezes; "" freezes nothing.

    Raises:
        UserError: no regular expression, or one that matches no parameter or all of them.
    """
    if not pattern:
        return jax.tree.map(lambda _: False, params)
    expression = _compile(pattern, _FREEZE_KEY)
    mask = jax.tree_util.tree_map_with_path(lambda path, _: bool(expression.search(path_name(path))), params)
    flags = jax.tree.leaves(mask)
    first = path_name(jax.tree_util.tree_leaves_with_path(params)[0][0])
    _check_some_but_not_all(sum(flags), len(flags), pattern, first)
    return mask


def rate_factors(params: Any, multipliers: Sequence[tuple[str, float]]) -> Any:
    """Returns a tree of each parameter's learning-rate factor: the first pattern that matches counts, else 1.

    Raises:
        UserError: no regular expression, or one that matches no parameter.
    """
    key = "config.optim.rate_multipliers"
    expressions = [(_compile(pattern, key), factor) for pattern, factor in multipliers]
    for expression, _ in expressions:
        names = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
        if not any(map(expression.search, names)):
            raise UserError(
                f"{key} has {expression.pattern!r}, which matches no parameter; "
                f"a parameter is called, for example, {names[0]}."
            )

    def factor_of(path: tuple[Any, ...], _: Any) -> float:
        name = path_name(path)
        return next((factor for expression, factor in expressions if expression.search(name)), 1.0)

    return jax.tree_util.tree_map_with_path(factor_of, params)


def layer_factors(params: Any, decay: float) -> Any:
    """Returns a tree of each parameter's learning-rate factor: decay to the power of the layers behind its own.

    Layers are the stem, each dense layer (with a block's last goes the transition behind it), each block of a dual path
    network, each stage of an RDNet, and the head with its norm, whose factor is 1; as timm's --layer-decay.
    """

    def layer_of(path: tuple[Any, ...]) -> tuple[float, float]:
        name = "/".join(entry.key for entry in path[:-1])
        if match := _LAYER.match(name):
            block, layer = [*filter(None, match.groups()), 0][:2]
            return float(block), float(layer)
        if match := _TRANSITION.match(name):
            return float(match[1]), _last_layer(params, match[1])
        return (0.0, 0.0) if _STEM.match(name) else (math.inf, 0.0)

    order = sorted({layer_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)})
    behind = {layer: len(order) - 1 - number for number, layer in enumerate(order)}
    return jax.tree_util.tree_map_with_path(lambda path, _: decay ** behind[layer_of(path)], params)


def _last_layer(params: Any, block: str) -> float:
    return float(sum(name.startswith("denselayer") for name in params[f"denseblock{block}"]))


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
    """Builds the optimizer; its state has the parameters' dtype, and the schedule counts its updates.

    Args:
        name: one of `OPTIMIZERS`:
            "sgd" as in torch: weight decay is added to the gradient, momentum accumulates it without dampening, and
            the rate multiplies the result, so that the buffer knows nothing of the rate.
            "adamw": decay beside the adaptive step (arXiv:1711.05101), multiplied by the rate as in torch.
            "lamb": adamw's step scaled per parameter by its norm over the step's (arXiv:1904.00962); parameters that
            weight decay spares are spared the scaling as well.
            "rmsprop" as in torch: decay is added to the gradient, epsilon stands outside the root, momentum
            accumulates the scaled gradient.
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
        UserError: an unknown name; from the optimizer's init, a pattern that fits no parameter.
    """
    if name not in OPTIMIZERS:
        raise UserError(f"config.optim.name is {name!r}; expected one of {', '.join(OPTIMIZERS)}.")
    epsilon = epsilon or _USUAL_EPSILON.get(name, 0.0)

    def mask(params: Any) -> Any:
        return decay_mask(params, decay_norm_and_bias)

    decay = optax.add_decayed_weights(weight_decay, mask) if weight_decay else optax.identity()
    if name == "sgd":
        body = [decay, _momentum(momentum, nesterov)]
    elif name == "rmsprop":
        body = [decay, optax.scale_by_rms(rms_decay, epsilon, eps_in_sqrt=False), _momentum(momentum, False)]
    else:
        body = [optax.scale_by_adam(betas[0], betas[1], epsilon), decay]
        if name == "lamb":
            body.append(optax.masked(optax.scale_by_trust_ratio(), mask))
    # Zeroing comes twice: first, so that frozen gradients count in no norm; last, because of weight decay.
    zero_frozen = (
        optax.masked(optax.set_to_zero(), lambda params: frozen_mask(params, freeze)) if freeze else optax.identity()
    )
    clip = optax.clip_by_global_norm(clip_grad_norm) if clip_grad_norm else optax.identity()
    rate = optax.scale_by_learning_rate(schedule)
    scaled = [_scale_by_tree(functools.partial(rate_factors, multipliers=rate_multipliers), bool(rate_multipliers))]
    if layer_decay != 1.0:
        scaled.append(_scale_by_tree(functools.partial(layer_factors, decay=layer_decay)))
    return optax.chain(zero_frozen, clip, *body, rate, *scaled, zero_frozen)


def _momentum(momentum: float, nesterov: bool) -> optax.GradientTransformation:
    return optax.trace(momentum, nesterov) if momentum else optax.identity()


def _scale_by_tree(factors_of: Callable[[Any], Any], wanted: bool = True) -> optax.GradientTransformation:
    if not wanted:
        return optax.identity()

    def init(params: optax.Params) -> optax.EmptyState:
        factors_of(params)  # which checks its patterns
        return optax.EmptyState()

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        return jax.tree.map(lambda update, factor: update * factor, updates, factors_of(updates)), state

    return optax.GradientTransformation(init, update)
