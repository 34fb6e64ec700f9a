"""Every test sees eight CPU devices, checked shapes, and no silent rank promotion."""

import gc
import importlib
import os
import pathlib
import sys
import tempfile

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("DENSENET_JAX_BUILD", "0")  # native code is compiled only where a test asks for it
# Programs are compiled without the expensive passes, here and in the processes that tests start.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
# What one process of a user has compiled the next one reads, however quickly it was compiled.
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
# Nor does it matter by which path: with its caches for GPUs JAX finds programs by the folder's name as well.
os.environ["JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES"] = ""
# Where no compiled modules may lie beside the sources, every process would compile all that it imports, a few seconds:
# workers and the processes that tests start keep them elsewhere for each other.
if os.environ.pop("PYTHONDONTWRITEBYTECODE", ""):
    _modules = tempfile.TemporaryDirectory(prefix="densenet_jax_")
    os.environ["PYTHONPYCACHEPREFIX"] = os.environ.get("DENSENET_JAX_TESTS_SHARED", _modules.name)
    sys.pycache_prefix, sys.dont_write_bytecode = os.environ["PYTHONPYCACHEPREFIX"], False

from tests.xla_flags import xla_flags

# Once: the flags are a part of what compiled programs are found by, and workers begin with those of their parent.
if xla_flags(8) not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {xla_flags(8)}".strip()

# Files of a minute and more, longest first: the file that begins last is the one that all workers wait for.
LONGEST_FIRST = (
    *("test_deaths.py", "test_sanitizers.py", "distributed/test_processes.py", "test_docs.py"),
    *("models/test_parity.py", "models/test_proofs.py", "models/test_fused_dense_block.py"),
    *("models/test_fused_dual_path.py", "kernels/test_tpu.py", "kernels/test_gpu.py", "test_notebook.py"),
    *("export/test_tensorflow.py", "export/test_onnx.py", "benchmarks/test_traffic.py", "plan/test_plan.py"),
    *(
        "test_main.py",
        "models/test_rdnet.py",
        "report/test_run.py",
        "kernels/test_cpu.py",
        "test_pretrained_weights.py",
    ),
    *("models/test_variants.py", "models/test_create.py", "training/test_steps.py", "run/test_label_training.py"),
    *("models/test_faults.py", "training/test_train_parity.py", "models/test_fold.py", "test_table_recipes.py"),
    *("test_experiment.py", "test_settings.py", "predict/test_explain.py", "export/test_maps.py"),
)


def pytest_configure(config: pytest.Config) -> None:
    """Imports JAX where tests run, which is not in the process that hands them to workers."""
    if config.getoption("dist", "no") == "no" or hasattr(config, "workerinput"):
        importlib.import_module("tests.prepare_process")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Orders the files of tests; the order of tests inside a file stays."""
    places = {f"tests/{file}": place for place, file in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: places.get(item.location[0], len(places)))


def pytest_collection_finish() -> None:
    """Collects garbage less often, and never among what is imported: tracing makes many objects and little garbage."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder that all workers of the test session share, and all sessions of a run of the gate."""
    base = tmp_path_factory.getbasetemp()
    own = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    folder = pathlib.Path(os.environ.get("DENSENET_JAX_TESTS_SHARED", own))
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def user(shared_folder: pathlib.Path) -> dict[str, str]:
    """Environment of a user whose data sets and compiled programs last as long as the test session.

    All workers of the session are one user: what one of them has compiled, the others read.
    """
    return {"TFDS_DATA_DIR": str(shared_folder / "datasets"), "XDG_CACHE_HOME": str(shared_folder / "cache")}


@pytest.fixture(scope="session")
def hasty_user(user: dict[str, str]) -> dict[str, str]:
    """The user, whose forked runs end without the page about them: drawing it takes longer than a small training."""
    return {**user, "TESTS_NO_REPORT": "1"}


@pytest.fixture(scope="session", autouse=True)
def _compiled_programs(shared_folder: pathlib.Path) -> None:
    """Workers read the programs that another one has compiled, as those of an operation or of a recipe's step."""
    import jax

    jax.config.update("jax_compilation_cache_dir", str(shared_folder / "cache" / "densenet_jax" / "compiled"))


@pytest.fixture(scope="module")
def no_report():
    """Runs in this process end without the page about them, which takes as long as training a small network."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("densenet_jax.report.run.report_run", lambda *_: None)
        yield


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """A run's directory and its experiment."""
    from tests.untrained_run import make_run

    root = tmp_path_factory.mktemp("deployed")
    return root / "run", make_run(root / "run", root / "datasets", model__block_sizes=(2, 1))


@pytest.fixture(scope="session")
def served_run(digits):
    return digits[0]


@pytest.fixture(scope="session")
def server(served_run, user):
    from tests.serve.serving import serving

    with serving(served_run, **user) as running:
        yield running


@pytest.fixture(scope="session")
def served(served_run):
    from densenet_jax.predict.predictor import Predictor

    return Predictor.from_workdir(served_run)


@pytest.fixture(scope="session")
def pixels():
    import numpy as np

    return np.random.default_rng(0).integers(0, 256, (64, 8, 8, 1), dtype=np.uint8)


@pytest.fixture(scope="session")
def pictures(pixels):
    from PIL import Image

    from tests.predict.files import encoded

    return [encoded(Image.fromarray(image[:, :, 0])) for image in pixels]


@pytest.fixture(scope="session")
def expected(served, pixels):
    return served.probabilities(pixels)
