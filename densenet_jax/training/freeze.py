"""Which parts of a network stand still, or learn more slowly, told by patterns of parameter paths.

A path is what `flax.traverse_util.flatten_dict(..., sep="/")` gives, the collection first:
`params/denseblock1/denselayer1/norm1/scale`. A pattern is a regular expression that is searched in it, so that
`^params/(?!classifier)` names everything but the classifier.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax

from densenet_jax.errors import UserError

_KEY = "config.optim.freeze"


def path_name(path: tuple[Any, ...], collection: str = "params") -> str:
    """The name of one leaf of a collection, given its key path there."""
    return f"{collection}/{jax.tree_util.keystr(path, simple=True, separator='/')}"


def _compiled(pattern: str, key: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(f"{key} is {pattern!r}, which is no regular expression ({error}).") from error


def _check_some_but_not_all(found: int, total: int, pattern: str, example: str) -> None:
    if 0 < found < total:
        return
    raise UserError(
        f"{_KEY} is {pattern!r}, which matches {found} of {total} parameters; expected some, but not all; "
        f"a parameter is called, for example, {example}."
    )


def frozen_mask(params: Any, pattern: str) -> Any:
    """True for each parameter that stands still, as a tree of the same shape.

    Args:
        params: the parameters, or their abstract shapes.
        pattern: see the module; "" freezes nothing.

    Raises:
        UserError: no regular expression, or one that matches no parameter or all of them.
    """
    if not pattern:
        return jax.tree.map(lambda _: False, params)
    expression = _compiled(pattern, _KEY)
    mask = jax.tree_util.tree_map_with_path(lambda path, _: bool(expression.search(path_name(path))), params)
    matched = jax.tree.leaves(mask)
    first = path_name(jax.tree_util.tree_leaves_with_path(params)[0][0])
    _check_some_but_not_all(sum(matched), len(matched), pattern, first)
    return mask


def rate_factors(params: Any, multipliers: Sequence[tuple[str, float]]) -> Any:
    """What the learning rate of each parameter is multiplied by, as a tree of the same shape.

    Args:
        params: the parameters, or their abstract shapes.
        multipliers: (pattern, factor) pairs; the first that matches counts, 1 where none does.

    Raises:
        UserError: no regular expression, or one that matches no parameter.
    """
    key = "config.optim.rate_multipliers"
    expressions = [(_compiled(pattern, key), factor) for pattern, factor in multipliers]
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


def freeze_mask_function(pattern: str) -> Callable[[Any], Any]:
    """`frozen_mask` as optax's transformations take it: a function of the parameters."""
    return lambda params: frozen_mask(params, pattern)
