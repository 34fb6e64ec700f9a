"""Runs the real entry point in a process of its own."""

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

ROOT = pathlib.Path(__file__).parent.parent


def environment(devices: int = 1, **changes: str) -> dict[str, str]:
    """The environment of a user with `devices` devices; JAX's own settings of this test process are left out."""
    kept = {key: value for key, value in os.environ.items() if key not in ("XLA_FLAGS", "COLUMNS")}
    flags = f"--xla_force_host_platform_device_count={devices}"
    # As in conftest.py: compiling takes most of a short run.
    quick = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    return {**kept, **quick, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, **changes}


def start_main(*arguments: str, devices: int = 1, **changes: str) -> subprocess.Popen[str]:
    """Starts `python main.py ARGUMENTS` from the project's root."""
    return subprocess.Popen(
        [sys.executable, "main.py", *arguments],
        cwd=ROOT,
        env=environment(devices, **changes),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run_main(*arguments: str, devices: int = 1, expect: int = 0, **changes: str) -> tuple[str, str]:
    """Runs `python main.py ARGUMENTS` to its end and returns its two outputs; the exit status must be `expect`."""
    with start_main(*arguments, devices=devices, **changes) as process:
        output, errors = process.communicate(timeout=500)
    assert process.returncode == expect, f"exit status {process.returncode}\n{output}\n{errors}"
    return output, errors


def last_line(output: str) -> dict[str, Any]:
    """The JSON object that ends a mode's standard output."""
    return json.loads(output.splitlines()[-1])
