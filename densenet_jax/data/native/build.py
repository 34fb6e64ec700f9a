"""Compiles the JPEG helper: `python -m densenet_jax.data.native.build`.

Reading JPEG files does it at first use. Needs a C compiler and libjpeg-turbo's headers (Debian: `apt-get install gcc
libjpeg-dev`; macOS: Xcode's tools and `brew install jpeg-turbo`). Without the helper the wheels' slower decoders are
used.
"""

import hashlib
import os
import pathlib
import platform

from densenet_jax.system.native_build import compile_library, find_compiler, library_places, main

_SOURCE = pathlib.Path(__file__).with_name("crop_decode.c")
_FLAGS = ("-O3", "-shared", "-fPIC")


def library_paths() -> list[pathlib.Path]:
    """Returns where the compiled helper may be: beside this file, else in the user's cache, named by a source hash."""
    return library_places(_SOURCE, f"{hashlib.sha256(_SOURCE.read_bytes()).hexdigest()[:12]}-{platform.machine()}")


def build() -> pathlib.Path:
    """Compiles the helper and returns its path.

    Raises:
        RuntimeError: there is no compiler, no libjpeg-turbo, or nowhere to write.
    """
    extra = os.environ.get("CFLAGS", "").split()
    command = [*find_compiler("CC", "cc", "C"), *_FLAGS, *extra]
    return compile_library(library_paths(), command, [_SOURCE], ["-ljpeg"])


if __name__ == "__main__":
    main(build)
