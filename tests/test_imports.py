"""Who may import whom: the heart of the package stays free of data libraries, settings and other frameworks."""

import ast
import functools
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent / "densenet_jax"
HEAVY = ("tensorflow", "torch", "tensorflow_datasets", "grain", "clu", "ml_collections", "tensorboard")
OURS = "densenet_jax"
# The rooms from the ground up: each imports only from floors below its own.
FLOORS = (
    ("errors", "version", "rng", "dtypes", "choices"),
    ("system", "scores"),
    ("kernels", "data"),
    ("training",),
    ("models", "augment", "config", "flags"),
    ("distributed",),
    ("experiment", "workdir"),
    ("predict", "run"),
    ("plan", "report"),
    ("export", "serve"),
    ("modes",),
    ("cli",),
    ("__main__",),
)


@functools.cache
def modules() -> dict[str, pathlib.Path]:
    paths = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        paths[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return paths


@functools.cache
def imports_at_load(path: pathlib.Path) -> set[str]:
    """Modules imported when the file is loaded, not inside its functions."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names & (modules().keys() | {name for name in names if not name.startswith(OURS)})


def test_importing_brings_in_no_other_framework():
    modules = ("densenet_jax", "densenet_jax.models.create", "densenet_jax.training.steps")
    lines = (f"import {name}; print([name for name in {HEAVY!r} if name in sys.modules])" for name in modules)
    code = "; ".join(("import sys", *lines))
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    assert output.stdout.split() == ["[]"] * len(modules)


def test_help_loads_no_jax():
    code = "import sys, densenet_jax.__main__ as m; assert m.help_or_version(['--help']); print('jax' in sys.modules)"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    assert output.stdout.strip() == "False"


def test_a_mistake_is_reported_before_what_only_a_run_needs_is_imported():
    """Settings and the place of weights need no JAX; data sets neither Orbax, Grain nor what draws reports."""
    code = """if True:
        import sys
        from densenet_jax import cli
        drawn = ("scipy", "matplotlib", "tensorboard")
        for word, late in (
            ("--config.data.mean=(0.1,0.2)", ("jax", "numpy", "densenet_jax.modes")),
            ("--config.model.pretrained=/no.pth", ("jax", "densenet_jax.modes")),
            ("--config.data.name=nowhere", ("orbax", "grain", "tensorflow", *drawn)),
        ):
            assert cli.main(["densenet-jax", "--config=digits", word]) == 2
            print([name for name in late if name in sys.modules])
    """
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    assert output.stdout.split() == ["[]", "[]", "[]"]


def test_models_training_and_kernels_know_neither_data_nor_settings():
    forbidden = tuple(f"{OURS}.{name}" for name in ("data", "config", "experiment", "run", "modes"))
    for name, path in modules().items():
        if name.startswith(tuple(f"{OURS}.{room}" for room in ("models", "training", "kernels", "augment"))):
            wrong = [other for other in imports_at_load(path) if other.startswith((*forbidden, *HEAVY))]
            wrong = [other for other in wrong if not other.startswith(f"{OURS}.training")]
            assert wrong == [], f"{name} imports {wrong}"


def test_the_plain_networks_know_neither_the_fused_implementation_nor_kernels():
    """They are read without it; `create` alone picks the fused implementation."""
    for name in ("layers", "densenet", "dual_path", "head"):
        forbidden = (f"{OURS}.models.fused", f"{OURS}.kernels")
        others = imports_at_load(modules()[f"{OURS}.models.{name}"])
        assert [other for other in others if other.startswith(forbidden)] == [], name
    pickers = {name for name, path in modules().items() if f"{OURS}.models.fused" in imports_at_load(path)}
    assert pickers == {f"{OURS}.models.create"}


def test_models_know_nothing_of_training():
    for name, path in modules().items():
        if name.startswith(f"{OURS}.models"):
            assert [other for other in imports_at_load(path) if other.startswith(f"{OURS}.training")] == [], name


def room(module: str) -> str:
    """The folder or the loose module at the top of the package that a module belongs to."""
    return [*module.split("."), "__init__"][1]


def test_no_import_runs_up():
    floors = {name: number for number, names in enumerate(FLOORS) for name in names}
    for name, path in modules().items():
        if room(name) == "__init__":
            continue
        above = {
            other
            for other in imports_at_load(path)
            if other.startswith(f"{OURS}.") and room(other) != room(name) and floors[room(other)] >= floors[room(name)]
        }
        assert above == set(), f"{name} imports {above}"


def test_only_the_experiment_modes_and_loop_read_the_settings():
    readers = {
        name for name, path in modules().items() if ".config." in path.read_text() or "config.seed" in path.read_text()
    }
    allowed = tuple(f"{OURS}.{name}" for name in ("experiment", "run", "modes", "config", "workdir", "plan.plan"))
    allowed += (f"{OURS}.predict.model", f"{OURS}.export.samples")
    assert {name for name in readers if not name.startswith(allowed)} - texts_only() == set()


def texts_only() -> set[str]:
    """Modules that name a setting in a message to the user, but read none."""
    names = set()
    for name, path in modules().items():
        tree = ast.parse(path.read_text())
        reads = any(isinstance(node, ast.Attribute) and node.attr in ("config",) for node in ast.walk(tree))
        if not reads:
            names.add(name)
    return names


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
