"""Prints warnings as status lines, ours and no library's."""

import importlib.util
import logging
import os
import sys
from collections.abc import Callable

from densenet_jax.system.console import print_status, redirect
from densenet_jax.system.disk import drop_late_errors
from densenet_jax.system.host import has_nvidia


def set_up_logging() -> None:
    """Prints our warnings, but only errors of the libraries."""
    for library in ("jax", "grain", "jax2onnx", "huggingface_hub"):
        logging.getLogger(library).setLevel(logging.ERROR)
    for library in ("absl", "asyncio", "orbax"):  # Orbax logs tracebacks of what it raises as well
        logging.getLogger(library).setLevel(logging.CRITICAL)
    sys.unraisablehook = drop_late_errors
    logging.getLogger("jax._src.xla_bridge").addFilter(_is_not_missing_gpu)
    ours = logging.getLogger("densenet_jax")
    ours.propagate = False
    ours.handlers = [_StatusHandler()]


def start_quietly(start: Callable[[], object]) -> None:
    """Calls `start`, which makes JAX load its plugins, where a CUDA plugin without a GPU would print a page about it.

    That is where the plugin is installed for `--mode plan` alone; elsewhere it does nothing.
    """
    if has_nvidia() or not any(map(importlib.util.find_spec, ("jax_cuda12_plugin", "jax_cuda13_plugin"))):
        return
    with open(os.devnull, "wb") as nothing, redirect(2, nothing.fileno()):
        start()


def _is_not_missing_gpu(record: logging.LogRecord) -> bool:
    """Drops JAX's traceback at every start if the CUDA plugin is installed for `--mode plan` alone."""
    is_plugins = record.getMessage().startswith("Jax plugin configuration error") and "xla_cuda" in record.getMessage()
    return not is_plugins or has_nvidia()


class _StatusHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        print_status(f"{record.levelname.lower()}: {record.getMessage()}")
