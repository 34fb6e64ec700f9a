"""The StableHLO file gives the model's answers where the model is not known."""

import os
import subprocess
import sys

import numpy as np
import pytest

from densenet_jax.export.graph import make_graph, reference_outputs
from tests.export.exporting import FAMILIES, export_small, images
from tests.extras import needs
from tests.main_in_process import run_here
from tests.main_processes import make_environment, parse_last_line

ALONE = """
import sys, importlib.util
import numpy as np
from jax import export
assert importlib.util.find_spec("densenet_jax") is None, "the package can be imported here"
exported = export.deserialize(bytearray(open(sys.argv[1], "rb").read()))
assert exported.platforms == ("cpu", "cuda", "tpu"), exported.platforms
images = np.load(sys.argv[2])
whole, single = exported.call(images), exported.call(images[:1])
np.testing.assert_allclose(whole[:1], single, atol=1e-6)
np.save(sys.argv[3], whole)
"""


@needs("flatbuffers")
@pytest.mark.parametrize("name", FAMILIES)
def test_it_runs_in_a_process_without_the_package(name, tmp_path):
    model, figures = export_small(tmp_path / "model.stablehlo", name, format="stablehlo")
    assert figures["max_abs_difference"] < 1e-6
    np.save(tmp_path / "images.npy", images())
    command = [sys.executable, "-P", "-c", ALONE, "model.stablehlo", "images.npy", "outputs.npy"]
    subprocess.run(command, cwd=tmp_path, env=make_environment(), check=True)
    expected = reference_outputs(make_graph(model), images())[0]
    np.testing.assert_allclose(np.load(tmp_path / "outputs.npy"), expected, rtol=0, atol=1e-6)


@needs("flatbuffers")
def test_the_batch_size_can_be_fixed(tmp_path):
    from densenet_jax.export.stablehlo import load

    export_small(tmp_path / "fixed", format="stablehlo", batch_size=4, preprocess=False)
    call = load(str(tmp_path / "fixed"))
    (logits,) = call(np.zeros((4, 32, 32, 3), np.float32))
    assert logits.shape == (4, 7)
    with pytest.raises(ValueError, match="4"):
        call(np.zeros((3, 32, 32, 3), np.float32))


@needs("flatbuffers")
def test_the_mode_exports_a_run(tmp_path, user, no_report):
    workdir = str(tmp_path / "run")
    short = ("--config.train.epochs=0.1", "--config.optim.warmup_epochs=0.0", "--config.model.block_sizes=(1,)")
    run_here("--workdir", workdir, *short, **user)
    output, errors = run_here("--workdir", workdir, "--mode", "export", "--format", "stablehlo", **user)
    figures = parse_last_line(output)
    assert list(figures) == ["mode", "format", "path", "max_abs_difference", "examples"]
    assert os.path.exists(figures["path"])
    assert figures["examples"] == 64
    assert "checked with images of digits test" in errors
    _, errors = run_here("--workdir", workdir, "--mode", "export", "--format", "stablehlo", expect=2, **user)
    assert errors.splitlines()[-1].startswith("error: --output")
