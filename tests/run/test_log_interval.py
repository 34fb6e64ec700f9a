"""Steps that have large temporaries on a CPU run one after the other."""

import jax
import jax.numpy as jnp
import pytest

from densenet_jax.run.log_interval import runs_alone


@pytest.mark.parametrize(("side", "alone"), [(8, False), (4096, True)])
def test_a_step_with_large_temporaries_runs_alone(side, alone, monkeypatch):
    step = jax.jit(lambda x: jnp.sin(x) @ x @ x).lower(jax.ShapeDtypeStruct((side, side), jnp.float32)).compile()
    assert runs_alone(step) is alone
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert runs_alone(step) is False
