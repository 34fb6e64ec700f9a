"""Finds and loads recipes: those of configs/ by name from any directory, and the user's own Python files."""

import ast
import difflib
import importlib
import importlib.util
import os
import pathlib
import runpy
import sys
from typing import Any

from densenet_jax.errors import UserError

_PACKAGE = pathlib.Path(__file__).parent.parent


def directory() -> pathlib.Path:
    """Returns the folder of the shipped recipes: configs/ of a checkout, or its copy inside the installed package."""
    installed = _PACKAGE / "configs"
    return installed if installed.is_dir() else _PACKAGE.parent / "configs"


def names() -> list[str]:
    """Returns the names of the shipped recipes."""
    return sorted(path.stem for path in directory().glob("*.py") if path.stem not in ("__init__", "default"))


def summaries() -> dict[str, str]:
    """Returns the first sentence of each shipped recipe's file, by its name."""
    texts = {name: (directory() / f"{name}.py").read_text(encoding="utf-8") for name in names()}
    return {name: (ast.get_docstring(ast.parse(text)) or "\n").splitlines()[0] for name, text in texts.items()}


def split_off(words: list[str]) -> tuple[str, list[str]]:
    """Splits a command line into the recipe of --config ("" if none) and the other words."""
    for place, word in enumerate(words):
        if word in ("--config", "-config") and place + 1 < len(words):
            return words[place + 1], [*words[:place], *words[place + 2 :]]
        if word.startswith(("--config=", "-config=")):
            return word.partition("=")[2], [*words[:place], *words[place + 1 :]]
    return "", words


def load(recipe: str) -> Any:
    """Returns the locked settings of a recipe; text after a colon is passed to its `get_config`.

    Args:
        recipe: name of a shipped one, or a path; configs/NAME.py means the shipped one if there is no such file.

    Raises:
        UserError: there is no such recipe, or it is not one.
    """
    path, _, choice = recipe.partition(":")
    get_config = _run(_find(path)).get("get_config")
    if not callable(get_config):
        raise UserError(
            f"--config {path} has no function get_config() that returns the settings; see configs/digits.py."
        )
    return (get_config(choice) if choice else get_config()).lock()


def defaults() -> Any:
    """Returns every setting with its default."""
    _register_configs()
    return importlib.import_module("configs.default").get_config()


def workdir_of(recipe: str) -> str:
    """Returns the default work directory of a recipe."""
    return os.path.join("runs", pathlib.Path(recipe.partition(":")[0]).stem)


def _find(path: str) -> pathlib.Path:
    file = pathlib.Path(path)
    if file.suffix == ".py" and file.is_file():
        return file
    shipped = directory() / f"{file.stem if file.suffix == '.py' else file.name}.py"
    if str(file.parent) in (".", "configs") and file.stem in names() and shipped.is_file():
        return shipped
    if file.exists():
        raise UserError(f"--config {path} is not a Python file (.py); name a recipe, or a file like configs/digits.py.")
    nearest = [f"the nearest is {name}, and" for name in difflib.get_close_matches(file.stem, names(), n=1)]
    raise UserError(f"--config {path}: there is no such recipe or file; {' '.join([*nearest, '--help lists them'])}.")


def _run(path: pathlib.Path) -> dict[str, Any]:
    """Runs a recipe and returns its global names."""
    _register_configs()
    try:
        return runpy.run_path(str(path), run_name=f"recipe_{path.stem}")
    except SyntaxError as error:
        raise UserError(f"--config {path} is not Python: {error.msg} in line {error.lineno}.") from error


def _register_configs() -> None:
    """Lets recipes write `from configs import default`, wherever they and the shipped ones are."""
    here = str(directory())
    package = sys.modules.get("configs")
    if package is not None and here in map(os.path.abspath, package.__path__):
        return
    for name in [name for name in sys.modules if name.startswith("configs.")]:
        del sys.modules[name]
    spec = importlib.util.spec_from_file_location(
        "configs", os.path.join(here, "__init__.py"), submodule_search_locations=[here]
    )
    assert spec is not None
    sys.modules["configs"] = importlib.util.module_from_spec(spec)
