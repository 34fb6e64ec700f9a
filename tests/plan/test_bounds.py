import pytest

from densenet_jax.plan.chips import CHIPS, Chip
from densenet_jax.plan.costs import Costs, compute_bounds, count_sent_bytes
from densenet_jax.plan.hlo import Collective

CHIP = Chip("x1", "tpu", 1e12, 10**9, 1e9, 1e8, 4, 2, "nowhere")


def costs(flops=0.0, traffic=0.0, *collectives):
    return Costs(0, 0, flops, 3 * traffic, traffic, collectives)


@pytest.mark.parametrize(
    ("op", "chips", "expected"),
    [
        ("all-reduce", 4, 1500),  # a ring sends every part round once to sum and once to tell
        ("all-gather", 4, 750),
        ("reduce-scatter", 4, 750),
        ("all-to-all", 2, 500),
        ("collective-permute", 4, 1000),
        ("all-reduce", 1, 0),
        ("collective-permute", 1, 0),
    ],
)
def test_bytes_sent_by_a_chip(op, chips, expected):
    assert count_sent_bytes(Collective(op, 500, 2), chips) == expected


@pytest.mark.parametrize(
    ("priced", "binding", "secs"),
    [
        (costs(3e12, 2e9), "arithmetic", 3.0),
        (costs(1e12, 2e9), "memory", 2.0),
        (costs(1e12, 2e9, Collective("all-reduce", 10**8, 4)), "interconnect", 4.0),
        (costs(None, 2e9), "memory", 2.0),
    ],
)
def test_the_longest_of_the_three_binds(priced, binding, secs):
    bounds = compute_bounds(priced, CHIP, 2)
    assert (bounds.binding, bounds.secs) == (binding, pytest.approx(secs))


def test_every_chip_names_the_source_of_its_figures():
    for name, chip in CHIPS.items():
        assert chip.name == name
        assert chip.source.startswith("https://")
        assert 1e14 < chip.flops < 1e16
        assert 1e10 < chip.link_bytes_per_sec < chip.memory_bytes_per_sec < 1e13 < 1e4 * chip.memory_bytes
