"""Every test sees eight CPU devices, checked shapes, and no silent rank promotion."""

import functools
import gc
import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("DENSENET_JAX_BUILD", "0")  # native code is compiled only where a test asks for it
# Programs are compiled without the expensive passes, here and in the processes that tests start.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
# What one process of a user has compiled the next one reads, however quickly it was compiled.
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

from tests.xla_flags import xla_flags

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {xla_flags(8)}"

from jaxtyping import install_import_hook

import tests.typecheck  # noqa: F401 - the hook below looks it up by name

# Before anything of ours is imported: from here on the shapes in signatures are checked at every call.
install_import_hook(["densenet_jax.models", "densenet_jax.training", "densenet_jax.augment"], "tests.typecheck.checked")

import jax  # noqa: E402
import numpy as np  # noqa: E402
import orbax.checkpoint as ocp  # noqa: E402
import pytest  # noqa: E402
from jax._src.interpreters import mlir  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
# All programs of a worker share a context: making one loads every dialect, a fifth of compiling a single operation.
mlir.make_ir_context = functools.cache(mlir.make_ir_context)
# A checkpoint is written by one of this process's eight devices and not by all in turns, for which every shape is
# sliced by a program of its own. The processes that tests start write as users' do.
ocp.type_handlers.get_type_handler(jax.Array)._use_replica_parallel = False

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
    return np.random.default_rng(0).integers(0, 256, (64, 8, 8, 1), dtype=np.uint8)


@pytest.fixture(scope="session")
def pictures(pixels):
    from PIL import Image

    from tests.predict.files import encoded

    return [encoded(Image.fromarray(image[:, :, 0])) for image in pixels]


@pytest.fixture(scope="session")
def expected(served, pixels):
    return served.probabilities(pixels)
