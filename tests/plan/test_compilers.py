"""The compilers' own counts of a product whose costs are known, for chips that are not there."""

import functools
import importlib

import pytest

from densenet_jax.errors import UserError
from densenet_jax.plan import compilers
from tests.extras import needs
from tests.main_processes import ROOT, parse_last_line, run_for_absent_chips

PRODUCT = """
import dataclasses, json, sys
import jax, jax.numpy as jnp
from densenet_jax.plan.compilers import absent_devices
from densenet_jax.plan.costs import compile_costs
from densenet_jax.plan.topology import parse_topology
from densenet_jax.training import sharding

def compute_costs(topology):
    mesh = sharding.make_mesh(absent_devices(topology))
    x = jax.ShapeDtypeStruct((1024 * topology.chips, 512), jnp.bfloat16, sharding=sharding.over_data(mesh))
    w = jax.ShapeDtypeStruct((512, 256), jnp.bfloat16, sharding=sharding.replicated(mesh))
    gradient = jax.jit(jax.grad(lambda w, x: jnp.square((x @ w).astype(jnp.float32)).sum()), out_shardings=w.sharding)
    costs = compile_costs(gradient.lower(w, x))
    return {**dataclasses.asdict(costs), "devices": mesh.size, "default": jax.default_backend()}

print(json.dumps({name: compute_costs(parse_topology(name)) for name in sys.argv[1:]}))
"""
TPUS = {"v5e:1x1": 1, "v5e:2x2": 4, "v4:2x2x2": 8, "v6e:2x4": 8}
GPUS = {"h200:1x1x1": 1, "h200:1x1x8": 8, "h100:1x2x8": 16}


@functools.cache
def costs_on(*topologies: str) -> dict[str, dict]:
    """The costs on each, all from one process."""
    return parse_last_line(run_for_absent_chips(PRODUCT, *topologies).stdout)


def check(costs: dict, chips: int) -> None:
    operands, product = 2 * (1024 * 512 + 512 * 256), 2 * 1024 * 256
    assert costs["devices"] == chips
    assert costs["default"] == "cpu"
    assert costs["memory_bytes"] >= operands
    # A compiler may split the sum: its parts are products in float32, written and read once more (20.4 to 21.0 MB).
    assert operands + product <= costs["traffic_bytes"] < 16 * (operands + product)
    sums = [one for one in costs["collectives"] if one["op"] == "all-reduce"]
    assert sum(one["count"] for one in sums) == (1 if chips > 1 else 0)
    assert all(one["bytes"] in (512 * 256 * 2, 512 * 256 * 4) for one in sums)


@pytest.mark.parametrize("topology", TPUS)
@needs("libtpu")
def test_a_product_on_tpus_that_are_not_there(topology):
    costs = costs_on(*TPUS)[topology]
    check(costs, TPUS[topology])
    assert costs["flops"] == pytest.approx(2 * 2 * 1024 * 512 * 256, rel=0.05)


@pytest.mark.parametrize("topology", GPUS)
@needs("jax_plugins.xla_cuda12")
def test_a_product_on_gpus_that_are_not_there(topology):
    check(costs_on(*GPUS)[topology], GPUS[topology])


@pytest.mark.parametrize(
    ("compiler", "file"), [("tpu", "requirements-plan.txt"), ("cuda", "requirements-plan-gpu.txt")]
)
def test_a_compiler_that_is_not_installed_is_named_with_the_command_that_installs_it(monkeypatch, compiler, file):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=f"pip install -r {file}"):
        compilers.check_installed(compiler)
    assert (ROOT / file).exists()
