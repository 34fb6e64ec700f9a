"""The search for the largest batch that fits with a real compiler, whose complaints are read as they come."""

from tests.extras import needs
from tests.main_processes import parse_last_line, run_for_absent_chips

PLAN = """
import json
import jax, jax.numpy as jnp
from configs import digits
from densenet_jax.config import check_config
from densenet_jax.plan import plan as planning
from densenet_jax.plan.compilers import absent_devices
from densenet_jax.plan.costs import compile_costs
from densenet_jax.training import sharding

def compute_step_costs(config, topology):
    '''A network of two layers, which compiles in a second, in place of the recipe's.'''
    mesh = sharding.make_mesh(absent_devices(topology))
    images = (config["train"]["global_batch_size"], 256)
    x = jax.ShapeDtypeStruct(images, jnp.float32, sharding=sharding.over_data(mesh))
    w = jax.ShapeDtypeStruct((256, 4096), jnp.float32, sharding=sharding.replicated(mesh))
    loss = lambda w, x: jnp.square(jnp.tanh(x @ w) @ w.T).sum()
    return compile_costs(jax.jit(jax.grad(loss)).lower(w, x))

planning.compute_step_costs = compute_step_costs
config = digits.get_config()
with config.unlocked():
    config.train.global_batch_size = 2**22
print(json.dumps(planning.plan(check_config(config), "v5e:1x1")))
"""


@needs("libtpu")
def test_a_batch_that_a_tpu_cannot_hold_is_reported_with_the_largest_that_it_can():
    run = run_for_absent_chips(PLAN)
    figures = parse_last_line(run.stdout)
    assert figures["fits"] is False
    largest = figures["largest_global_batch_that_fits"]
    fits = [line for line in run.stderr.splitlines() if f"a batch of {largest} fits: " in line]
    assert len(fits) == 1
    # The first layer's outputs are 16 kB an image, and the memory is 2**34 bytes.
    assert 2**19 < largest < 2**20
    failing = [int(line.split()[3]) for line in run.stderr.splitlines() if "does not fit: " in line]
    assert largest < min(failing) <= 1.01 * largest
    assert f"{min(failing)}, {min(failing) / largest - 1:.1%} more, does not fit" in run.stderr
    assert run.stderr.count("compiling for a batch of ") <= 2 * 4  # when it begins and when it ends
