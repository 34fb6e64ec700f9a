"""Compiles the package's own small libraries on the machine that uses them, at first use or by a command.

DENSENET_JAX_NATIVE=0 forbids their use, DENSENET_JAX_BUILD=0 only compiling them at first use.
"""

import contextlib
import fcntl
import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from densenet_jax.system.console import print_status
from densenet_jax.system.disk import user_cache

Paths = Sequence[pathlib.Path]
_BUILD_SECS = 600.0  # zig compiles its own C++ library the first time: two minutes on two idle cores
_NO_COMPILER = "no compiler"


def library_places(source: pathlib.Path, key: str) -> list[pathlib.Path]:
    """Returns where the library compiled from `source` may be: beside it, else in the user's cache.

    `key`, part of the file's name, changes with everything that the library depends on.
    """
    name = f"{source.stem}-{key}{sysconfig.get_config_var('SHLIB_SUFFIX') or '.so'}"
    return [source.with_name(name), pathlib.Path(user_cache(name))]


def find_compiler(variable: str, usual: str, language: str) -> list[str]:
    """Returns the compiler command that an environment variable (CC or CXX) names, else `usual`, else zig's.

    Raises:
        RuntimeError: there is none.
    """
    if compiler := shutil.which(os.environ.get(variable, usual)):
        return [compiler]
    if variable not in os.environ and importlib.util.find_spec("ziglang"):
        return [sys.executable, "-m", "ziglang", usual]  # "cc" and "c++" are its subcommands, too
    raise RuntimeError(
        f"{_NO_COMPILER} for {language} was found ({variable} names none and there is no {usual}); "
        "`pip install ziglang` brings one."
    )


def build_at_first_use(what: str, places: Paths, build: Callable[[], pathlib.Path]) -> None:
    """Compiles a missing library, once on this machine; reports it in one line and never fails.

    One process compiles and others wait. A failure is recorded in the user's cache, else beside the sources, and not
    tried again before they change, unless there was no compiler.
    """
    if "0" in (os.environ.get("DENSENET_JAX_BUILD"), os.environ.get("DENSENET_JAX_NATIVE")):
        return
    if any(map(os.path.exists, places)):
        return
    failed = next((path for path in reversed(places) if _writable(path.parent)), places[-1]).with_suffix(".failed")
    with contextlib.suppress(OSError), open(failed.with_suffix(".lock"), "a", encoding="utf-8") as lock:
        if not _take_lock(lock.fileno()) or any(map(os.path.exists, places)):
            return
        before = failed.read_text(encoding="utf-8") if failed.exists() else ""
        if before and not before.startswith(_NO_COMPILER):
            return
        start = time.perf_counter()
        try:
            build()
            print_status(f"compiled {what} for this machine, once: {time.perf_counter() - start:.0f} s")
        except RuntimeError as error:
            if (why := " ".join(str(error).split())[:300]) == before:
                return
            failed.write_text(why, encoding="utf-8")
            again = "" if why.startswith(_NO_COMPILER) else f" (remove {failed} to try again)"
            print_status(f"{what} can't be compiled here, so it is slower: {why}{again}")


def _take_lock(file: int) -> bool:
    """Waits for the lock, as long as another process may compile; returns whether to compile."""
    end = time.monotonic() + _BUILD_SECS
    while time.monotonic() < end:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.2)
        except OSError:  # no locks on this file system: compiling twice does no harm
            return True
        else:
            return True
    return False


def compile_library(
    places: Paths, command: Sequence[str], sources: Paths, libraries: Sequence[str] = ()
) -> pathlib.Path:
    """Compiles sources side by side and links them in the first writable place, which is returned.

    Args:
        command: the compiler and its flags, for compiling and linking.
        libraries: flags that name what is linked as well.

    Raises:
        RuntimeError: it fails, or there is nowhere to write.
    """
    place = next((path for path in places if _writable(path.parent)), None)
    if place is None:
        raise RuntimeError("Neither the package nor the user's cache can be written.")
    with tempfile.TemporaryDirectory(dir=place.parent) as folder:
        linked, *objects = (os.path.join(folder, name) for name in (place.name, *(f"{s.stem}.o" for s in sources)))
        commands = [[*command, "-c", str(s), "-o", made] for s, made in zip(sources, objects, strict=True)]
        with ThreadPoolExecutor() as pool:
            list(pool.map(_run_compiler, commands))
        _run_compiler([*command, *objects, *libraries, "-o", linked])
        os.replace(linked, place)
    return place


def _run_compiler(command: Sequence[str]) -> None:
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_BUILD_SECS)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"{command[0]} took longer than {_BUILD_SECS:.0f} s") from error
    except OSError as error:
        raise RuntimeError(f"{command[0]} failed: {error}") from error
    if result.returncode:
        lines = result.stderr.strip().splitlines() or ["no message"]
        why = next((line for line in lines if "error" in line), lines[0])
        raise RuntimeError(f"{' '.join(command)} failed: {why}")


def _writable(folder: pathlib.Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)


def main(build: Callable[[], pathlib.Path]) -> None:
    """Builds and prints the result; exit status 2 if it failed."""
    try:
        print(f"Built {build()}")
    except RuntimeError as failure:
        print(f"error: {failure}", file=sys.stderr)
        sys.exit(2)
