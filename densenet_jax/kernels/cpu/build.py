"""Compiles the CPU kernels: `python -m densenet_jax.kernels.cpu.build`.

Training on a CPU does so at its first use. Needs a C++17 compiler (Debian: `apt-get install g++`; macOS: Xcode's tools;
anywhere: `pip install ziglang`); XLA's headers come with jaxlib. Without the kernels everything works, at the speed of
XLA's own convolutions.
"""

from __future__ import annotations

import hashlib
import os
import pathlib
import platform
import re

import jax
import jaxlib

from densenet_jax.system.native_build import compile_library, find_compiler, library_places, main

_FOLDER = pathlib.Path(__file__).parent / "native"
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fvisibility=hidden")
_LIBRARY_FLAGS = ("-shared", "-fPIC", "-pthread")


def _processor() -> str:
    """Returns the processor's instruction sets: different machines may share a cache directory."""
    try:
        match = re.search(r"^(?:flags|Features)\s*:(.*)$", pathlib.Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        match = None
    return match[1] if match else platform.processor()


def library_paths() -> list[pathlib.Path]:
    """Returns the possible paths of the compiled library: beside its source, else in the user's cache.

    The name hashes all that it depends on: the sources, XLA's interface and the processor's instructions.
    """
    files = sorted(path for path in _FOLDER.iterdir() if path.suffix in (".cc", ".h"))
    sources = b"".join(path.read_bytes() for path in files)
    inputs = sources + f"{jaxlib.__version__} {platform.machine()} {_processor()}".encode()
    return library_places(_FOLDER / "densenet_cpu.cc", hashlib.sha256(inputs).hexdigest()[:12])


def build() -> pathlib.Path:
    """Compiles the library and returns its path.

    Raises:
        RuntimeError: there is no compiler, it fails, or there is nowhere to write.
    """
    extra = os.environ.get("CXXFLAGS", "").split()
    compiler, include = find_compiler("CXX", "c++", "C++"), f"-I{jax.ffi.include_dir()}"
    command = [*compiler, *_FLAGS, *_LIBRARY_FLAGS, *extra, include]
    return compile_library(library_paths(), command, sorted(_FOLDER.glob("*.cc")))


if __name__ == "__main__":
    main(build)
