"""Runs the command line in this process: no start of Python, no import, and programs that are compiled already."""

import contextlib
import io
import logging
import os
import sys
from collections.abc import Iterator
from unittest import mock

import jax

from densenet_jax import cli

_LOGGERS = ("jax", "grain", "jax2onnx", "absl", "asyncio", "orbax", "densenet_jax", "jax._src.xla_bridge")


@contextlib.contextmanager
def keep_settings() -> Iterator[None]:
    """Restores what `densenet_jax.modes.run` sets for its process."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    before = [(log.level, log.propagate, log.handlers, log.filters[:]) for log in loggers]
    hook, cache = sys.unraisablehook, jax.config.jax_compilation_cache_dir
    try:
        yield
    finally:
        for log, (level, log.propagate, log.handlers, log.filters) in zip(loggers, before, strict=True):
            log.setLevel(level)
        sys.unraisablehook = hook
        jax.config.update("jax_compilation_cache_dir", cache)


def run_here(*arguments: str, expect: int = 0, **environment: str) -> tuple[str, str]:
    """Runs `densenet-jax ARGUMENTS` and returns its two outputs; the exit status must be `expect`."""
    output, errors = io.StringIO(), io.StringIO()
    with (
        keep_settings(),
        mock.patch.dict(os.environ, environment),
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(errors),
    ):
        status = cli.main(["densenet-jax", *arguments])
    assert status == expect, f"exit status {status}\n{output.getvalue()}\n{errors.getvalue()}"
    return output.getvalue(), errors.getvalue()
