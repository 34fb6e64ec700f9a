"""Compiles the helper: `python -m densenet_jax.data.native.build`.

Needs a C compiler and libjpeg-turbo's headers (Debian: `apt-get install gcc libjpeg-dev`; macOS: Xcode's tools and
`brew install jpeg-turbo`). Without the helper everything works, with the wheels' decoders and at their speed.
"""

import hashlib
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile

_SOURCE = pathlib.Path(__file__).with_name("crop_decode.c")
_FLAGS = ("-O3", "-shared", "-fPIC")


def library_paths() -> list[pathlib.Path]:
    """Where the compiled helper may lie: beside this file, else in the user's cache, named by the source."""
    key = hashlib.sha256(_SOURCE.read_bytes()).hexdigest()[:12]
    name = f"crop_decode-{key}-{platform.machine()}{sysconfig.get_config_var('SHLIB_SUFFIX') or '.so'}"
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    return [_SOURCE.with_name(name), cache / "densenet_jax" / name]


def build() -> pathlib.Path:
    """Compiles the helper and returns where it lies.

    Raises:
        RuntimeError: there is no compiler, no libjpeg-turbo, or nowhere to write.
    """
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if not compiler:
        raise RuntimeError("No C compiler was found (CC names none and there is no cc).")
    places = [path for path in library_paths() if _writable(path.parent)]
    if not places:
        raise RuntimeError("Neither the package nor the user's cache can be written.")
    with tempfile.TemporaryDirectory(dir=places[0].parent) as folder:
        compiled = pathlib.Path(folder) / places[0].name
        extra = os.environ.get("CFLAGS", "").split()
        command = [compiler, *_FLAGS, *extra, "-o", str(compiled), str(_SOURCE), "-ljpeg", "-lm"]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            lines = result.stderr.strip().splitlines() or ["no message"]
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
