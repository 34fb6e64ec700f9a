import pytest

from densenet_jax.errors import UserError
from densenet_jax.plan.chips import CHIPS
from densenet_jax.plan.topology import make_example, parse_topology


@pytest.mark.parametrize(
    ("name", "chips", "hosts"),
    [
        ("v5e:1x1", 1, 1),
        ("v5e:2x2", 4, 1),
        ("v5e:16x16", 256, 64),
        ("v6e:2x4", 8, 2),
        ("v4:2x2x1", 4, 1),
        ("v4:2x2x2", 8, 2),
        ("v5p:4x8x12", 384, 96),
        ("h200:1x1x1", 1, 1),
        ("h200:1x1x8", 8, 1),
        ("h200:1x4x8", 32, 4),
    ],
)
def test_a_name_stands_for_chips_and_hosts(name, chips, hosts):
    topology = parse_topology(name)
    assert (topology.chips, topology.hosts) == (chips, hosts)


@pytest.mark.parametrize("chip", CHIPS.values(), ids=lambda chip: chip.name)
def test_the_make_example_every_chip_is_one_host(chip):
    assert parse_topology(make_example(chip)).hosts == 1


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("v5x:2x2", "did you mean v5"),
        ("H200:1x1x8", "did you mean h200 (h200:1x1x8)"),
        ("", "Known are v4, v5e"),
        ("tpu", "is not a known chip"),
        ("v5e", "not a shape of v5e"),
        ("v5e:", "v5e:2x2"),
        ("v5e:3x3", "v5e:2x4"),
        ("v5e:16x32", "v5e:16x16"),
        ("v5e:2x2x2", "v5e:2x4"),
        ("v5e:-2x2", "not a shape"),
        ("v5e:2x2; rm -rf", "not a shape"),
        ("v5e:0x4", "not a shape"),
        ("v5e:99999x99999", "not a shape"),
        ("v4:2x2", "for example v4:2x2x1"),
        ("v4:8x4x4", "v4:4x4x8"),
        ("h200:8", "h200:1x1x8"),
        ("h200:1x1x16", "h200:1x2x8"),
        ("h200:2x1x8", "h200:1x2x8"),
        ("h200:1x9999x8", "h200:1x1024x8"),
    ],
)
def test_a_topology_that_does_not_exist_is_refused_with_the_nearest_that_does(name, says):
    with pytest.raises(UserError) as refused:
        parse_topology(name)
    assert says in str(refused.value)
