"""Versions and hardware of this process, as pairs of text."""

import collections
import importlib.metadata
import os
import platform

import jax

from densenet_jax.version import __version__

_LIBRARIES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "tensorflow-datasets",
    "numpy",
    "matplotlib",
)


def versions() -> list[tuple[str, str]]:
    """Returns the versions of this package, Python and the libraries that affect results."""
    rows = [("densenet_jax", __version__), ("python", platform.python_version())]
    for name in _LIBRARIES:
        try:
            rows.append((name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            rows.append((name, "not installed"))
    return rows


def hardware() -> list[tuple[str, str]]:
    """Returns devices, processes, cores and memory."""
    kinds = collections.Counter(f"{device.platform} ({device.device_kind})" for device in jax.devices())
    rows = [
        ("devices", ", ".join(f"{count} × {kind}" for kind, count in kinds.items())),
        ("processes", str(jax.process_count())),
        ("machine", f"{platform.system()} {platform.machine()}"),
        ("cores", str(os.cpu_count())),
    ]
    if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        rows.append(("memory", f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.1f} GiB"))
    return rows
