"""Compiles in a separate process, which may crash, run out of memory or print anything.

    python -m densenet_jax.plan.worker < request.json

The request is {"config", "topology"}; the last line of standard output is {"costs"}, {"does_not_fit"} or {"mistake"}.
"""

import dataclasses
import json
import os
import subprocess
import sys
from typing import Any

import jax
import ml_collections

from densenet_jax.config import check_config
from densenet_jax.errors import UserError
from densenet_jax.experiment import Experiment
from densenet_jax.kernels.cpu.primitive import plain_kernels
from densenet_jax.plan.compilers import ENVIRONMENT, absent_devices
from densenet_jax.plan.costs import Costs, DoesNotFitError, compile_costs
from densenet_jax.plan.hlo import Collective
from densenet_jax.plan.topology import Topology, parse_topology


def compute_step_costs(config: dict[str, Any], topology: Topology) -> Costs:
    """Returns the costs of the training step of these settings for each chip of a topology.

    Raises:
        DoesNotFitError: a chip's memory is too small for it.
        UserError: the settings are invalid, or the compiler failed.
    """
    request = json.dumps({"config": config, "topology": topology.name})
    command = [sys.executable, "-m", __name__]
    variables = os.environ | ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(command, input=request, env=variables, capture_output=True, text=True, check=False)
    try:
        answer = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        output = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit status {done.returncode}"]
        raise UserError(
            f"compiling for {topology.name} failed: {output[-1].strip()}. If the compiler ran out of memory "
            "(exit status -9), plan on a machine with more."
        ) from None
    if "mistake" in answer:
        raise UserError(answer["mistake"])
    if "does_not_fit" in answer:
        raise DoesNotFitError(**answer["does_not_fit"])
    costs = answer["costs"]
    return Costs(**{**costs, "collectives": tuple(Collective(**one) for one in costs["collectives"])})


def _compile(request: dict[str, Any]) -> dict[str, Any]:
    try:
        config = check_config(ml_collections.ConfigDict(request["config"]))
        devices = tuple(absent_devices(parse_topology(request["topology"])))
        with plain_kernels():  # this machine's
            lowered = Experiment(config, absent_devices=devices).lower_train_step()
        costs = compile_costs(lowered)
        if costs.flops is None:
            costs = dataclasses.replace(costs, flops=_count_traced_flops(request["config"], len(devices)))
    except UserError as mistake:
        return {"mistake": str(mistake)}
    except DoesNotFitError as full:
        return {"does_not_fit": {"needed_bytes": full.needed_bytes, "limit_bytes": full.limit_bytes}}
    return {"costs": dataclasses.asdict(costs)}


def _count_traced_flops(settings: dict[str, Any], chips: int) -> float | None:
    """Counts a chip's share of the operations of the step as traced for this machine; None if unknown.

    The batch is taken as a whole, since XLA counts a loop body once.
    """
    whole = {**settings, "train": {**settings["train"], "microbatches": 1}}
    whole["model"] = {**settings["model"], "kernels": "xla"}  # this machine has no other kernels
    experiment = Experiment(check_config(ml_collections.ConfigDict(whole)), absent_devices=(jax.devices()[0],))
    with plain_kernels():  # whose operations nobody counts
        flops = (experiment.lower_train_step().cost_analysis() or {}).get("flops")
    return None if flops is None else flops / chips


if __name__ == "__main__":
    print(json.dumps(_compile(json.load(sys.stdin))), flush=True)
