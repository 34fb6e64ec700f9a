"""Compiles the CPU's convolutions: `python -m densenet_jax.kernels.cpu.build`.

Needs a C++17 compiler (Debian: `apt-get install g++`; macOS: Xcode's tools); XLA's headers come with jaxlib. Without
the library everything works, at the speed of XLA's own convolutions.
"""

from __future__ import annotations

import hashlib
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile

import jax
import jaxlib

_SOURCE = pathlib.Path(__file__).with_name("convolution.cc")
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC", "-pthread")


def _processor() -> str:
    """What the compiled code may use: a cache directory can be shared by different machines."""
    try:
        found = re.search(r"^(?:flags|Features)\s*:(.*)$", pathlib.Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor()


def library_paths() -> list[pathlib.Path]:
    """Where the compiled library may lie: beside this file, else in the user's cache.

    The name holds what it was compiled from: the source, XLA's interface and the processor's instructions.
    """
    facts = _SOURCE.read_bytes() + f"{jaxlib.__version__} {platform.machine()} {_processor()}".encode()
    suffix = sysconfig.get_config_var("SHLIB_SUFFIX") or ".so"
    name = f"convolution-{hashlib.sha256(facts).hexdigest()[:12]}{suffix}"
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    return [_SOURCE.with_name(name), cache / "densenet_jax" / name]


def build() -> pathlib.Path:
    """Compiles the library and returns where it lies.

    Raises:
        RuntimeError: there is no compiler, it fails, or there is nowhere to write.
    """
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if not compiler:
        raise RuntimeError("No C++ compiler was found (CXX names none and there is no c++).")
    places = [path for path in library_paths() if _writable(path.parent)]
    if not places:
        raise RuntimeError("Neither the package nor the user's cache can be written.")
    with tempfile.TemporaryDirectory(dir=places[0].parent) as folder:
        compiled = pathlib.Path(folder) / places[0].name
        extra = os.environ.get("CXXFLAGS", "").split()
        command = [compiler, *_FLAGS, *extra, f"-I{jax.ffi.include_dir()}", "-o", str(compiled), str(_SOURCE)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            lines = [line for line in result.stderr.splitlines() if "error" in line] or ["no message"]
            raise RuntimeError(f"{' '.join(command)} failed: {lines[0]}")
        os.replace(compiled, places[0])
    return places[0]


def _writable(folder: pathlib.Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)


if __name__ == "__main__":
    try:
        print(f"Built {build()}")
    except RuntimeError as failure:
        print(f"error: {failure}", file=sys.stderr)
        sys.exit(2)
