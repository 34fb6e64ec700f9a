"""Who may import whom: the heart of the package stays free of data libraries, settings and other frameworks."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent / "densenet_jax"
HEAVY = ("tensorflow", "torch", "tensorflow_datasets", "grain", "clu", "ml_collections", "tensorboard")
OURS = "densenet_jax"


def modules() -> dict[str, pathlib.Path]:
    found = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_at_load(path: pathlib.Path) -> set[str]:
    """Modules imported when the file is loaded, not inside its functions."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found & (modules().keys() | {name for name in found if not name.startswith(OURS)})


@pytest.mark.parametrize("module", ["densenet_jax", "densenet_jax.training.steps", "densenet_jax.models.create"])
def test_importing_brings_in_no_other_framework(module):
    code = f"import sys, {module}; print([name for name in {HEAVY!r} if name in sys.modules])"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    assert output.stdout.strip() == "[]"


def test_models_training_and_kernels_know_neither_data_nor_settings():
    forbidden = tuple(f"{OURS}.{name}" for name in ("data", "config", "experiment", "train", "evaluate", "modes"))
    for name, path in modules().items():
        if name.startswith((f"{OURS}.models", f"{OURS}.training", f"{OURS}.kernels")):
            wrong = [other for other in imports_at_load(path) if other.startswith((*forbidden, *HEAVY))]
            wrong = [other for other in wrong if not other.startswith(f"{OURS}.training")]
            assert wrong == [], f"{name} imports {wrong}"


def test_models_know_nothing_of_training():
    for name, path in modules().items():
        if name.startswith(f"{OURS}.models"):
            assert [other for other in imports_at_load(path) if other.startswith(f"{OURS}.training")] == [], name


def test_data_knows_nothing_of_ours_but_the_error_and_the_compiler():
    for name, path in modules().items():
        if name.startswith(f"{OURS}.data"):
            ours = {other for other in imports_at_load(path) if other.startswith(f"{OURS}.")}
            wrong = {
                other for other in ours if not other.startswith((f"{OURS}.data", f"{OURS}.errors", f"{OURS}.compiling"))
            }
            assert wrong == set(), name


def test_only_the_experiment_modes_and_loop_read_the_settings():
    readers = {
        name for name, path in modules().items() if ".config." in path.read_text() or "config.seed" in path.read_text()
    }
    allowed = (
        f"{OURS}.experiment",
        f"{OURS}.train",
        f"{OURS}.modes",
        f"{OURS}.config",
        f"{OURS}.workdir",
        f"{OURS}.plan.plan",
    )
    assert {name for name in readers if not name.startswith(allowed)} - texts_only() == set()


def texts_only() -> set[str]:
    """Modules that name a setting in a message to the user, but read none."""
    found = set()
    for name, path in modules().items():
        tree = ast.parse(path.read_text())
        reads = any(isinstance(node, ast.Attribute) and node.attr in ("config",) for node in ast.walk(tree))
        if not reads:
            found.add(name)
    return found


def test_no_import_cycles():
    known = modules()
    graph = {
        name: {other for other in imports_at_load(path) if other in known} - {name} for name, path in known.items()
    }
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, " -> ".join((*way, name))
        if name not in done:
            for other in graph[name]:
                visit(other, (*way, name))
            done.add(name)

    for name in graph:
        visit(name, ())
