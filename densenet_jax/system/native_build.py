"""Small libraries of our own, compiled on the machine that they are for: where they lie, and the call of a compiler."""

import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Sequence


def library_places(source: pathlib.Path, key: str) -> list[pathlib.Path]:
    """Where the library compiled from `source` may lie: beside it, else in the user's cache.

    Args:
        source: its source, or the file of several that the compiler is given.
        key: stands in the file's name; changes with everything that the library depends on.
    """
    name = f"{source.stem}-{key}{sysconfig.get_config_var('SHLIB_SUFFIX') or '.so'}"
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    return [source.with_name(name), cache / "densenet_jax" / name]


def find_compiler(variable: str, usual: str, language: str) -> str:
    """The compiler that an environment variable names, else the usual one.

    Raises:
        RuntimeError: there is none.
    """
    if compiler := shutil.which(os.environ.get(variable, usual)):
        return compiler
    raise RuntimeError(f"No {language} compiler was found ({variable} names none and there is no {usual}).")


def compile_library(places: Sequence[pathlib.Path], command: Sequence[str]) -> pathlib.Path:
    """Runs a compiler and moves what it wrote to the first place that can be written, which is returned.

    Args:
        places: where the library may lie.
        command: the compiler and its arguments, without the output's name.

    Raises:
        RuntimeError: it fails, or there is nowhere to write.
    """
    place = next((path for path in places if _writable(path.parent)), None)
    if place is None:
        raise RuntimeError("Neither the package nor the user's cache can be written.")
    with tempfile.TemporaryDirectory(dir=place.parent) as folder:
        compiled = pathlib.Path(folder) / place.name
        result = subprocess.run([*command, "-o", str(compiled)], capture_output=True, text=True, check=False)
        if result.returncode:
            lines = result.stderr.strip().splitlines() or ["no message"]
            why = next((line for line in lines if "error" in line), lines[0])
            raise RuntimeError(f"{' '.join(command)} failed: {why}")
        os.replace(compiled, place)
    return place


def _writable(folder: pathlib.Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)


def main(build: Callable[[], pathlib.Path]) -> None:
    """Builds, and tells a person what came of it; exit status 2 where it failed."""
    try:
        print(f"Built {build()}")
    except RuntimeError as failure:
        print(f"error: {failure}", file=sys.stderr)
        sys.exit(2)
