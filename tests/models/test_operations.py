"""The counted multiply-adds are those that torchvision and timm publish for their models, and right by hand."""

import jax
import jax.numpy as jnp
import pytest

from densenet_jax.models.create import create_model
from densenet_jax.models.operations import count_multiply_adds
from tests.models import golden

PUBLISHED_GIGA = {  # torchvision's weights pages ("GFLOPS", 224 px); for DPN table 2 of 1707.01629, one decimal
    "densenet121": 2.83,
    "densenet161": 7.73,
    "densenet169": 3.36,
    "densenet201": 4.29,
    "dpn92": 6.5,
    "dpn98": 11.7,
}
QUICK = "densenet121"


def of_model(name: str, side_px: int) -> int:
    model = create_model(name, num_classes=1000, block_form="plain")  # the papers' order of pooling and convolution
    images = jax.ShapeDtypeStruct((1, side_px, side_px, 3), jnp.float32)
    return count_multiply_adds(lambda v, x: model.apply(v, x, train=False), golden.abstract_variables(name), images)


@pytest.mark.parametrize(
    "name", [name if name == QUICK else pytest.param(name, marks=pytest.mark.slow) for name in PUBLISHED_GIGA]
)
def test_models_cost_what_is_published(name):
    decimals = len(str(PUBLISHED_GIGA[name]).split(".")[1])
    assert round(of_model(name, 224) / 1e9, decimals) == PUBLISHED_GIGA[name]


def test_operations_by_hand():
    x, w = jnp.zeros((2, 8, 8, 6)), jnp.zeros((3, 3, 3, 10))

    def grouped(x, w):
        return jax.lax.conv_general_dilated(
            x, w, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=2
        )

    assert count_multiply_adds(grouped, x, w) == 2 * 4 * 4 * 10 * 3 * 3 * 3
    assert count_multiply_adds(jax.jit(lambda a, b: a @ b), jnp.zeros((5, 7)), jnp.zeros((7, 3))) == 5 * 7 * 3
    looped = lambda a: jax.lax.scan(lambda c, _: (c @ c, None), a, None, length=4)[0]  # noqa: E731
    assert count_multiply_adds(looped, jnp.zeros((3, 3))) == 4 * 27
    chosen = lambda a: jax.lax.cond(True, lambda a: a @ a @ a, lambda a: a @ a, a)  # noqa: E731
    assert count_multiply_adds(chosen, jnp.zeros((3, 3))) == 2 * 27
    assert count_multiply_adds(lambda a: jnp.exp(a) + 1, x) == 0
