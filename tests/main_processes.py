"""Runs the real entry point in a process of its own."""

import concurrent.futures
import json
import os
import pathlib
import socket
import subprocess
import sys
from typing import Any, TypeAlias

from densenet_jax.plan.compilers import ENVIRONMENT
from tests.forked_main import ForkedMain, can_fork
from tests.xla_flags import xla_flags

ROOT = pathlib.Path(__file__).parent.parent
Process: TypeAlias = subprocess.Popen[str] | ForkedMain


def make_environment(devices: int = 1, **changes: str) -> dict[str, str]:
    """The environment of a user with `devices` devices; JAX's own settings of this test process are left out."""
    kept = {key: value for key, value in os.environ.items() if key not in ("XLA_FLAGS", "COLUMNS")}
    quick = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "XLA_FLAGS": xla_flags(devices)}
    return {**kept, **quick, "JAX_PLATFORMS": "cpu", **changes}


def start_main(
    *arguments: str, devices: int = 1, fresh: bool = False, folder: pathlib.Path = ROOT, **changes: str
) -> Process:
    """Starts `python main.py ARGUMENTS` from `folder`, the project's root or a copy of it.

    Args:
        arguments: flags.
        devices: how many devices the process sees.
        fresh: whether it is a new interpreter in any case, and not a process forked from one that has imported all.
        changes: environment variables.
    """
    env = make_environment(devices, **changes)
    if not fresh and can_fork(env):
        return ForkedMain(arguments, env, folder)
    return subprocess.Popen(
        [sys.executable, "main.py", *arguments],
        cwd=folder,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run_main(*arguments: str, expect: int = 0, **options: Any) -> tuple[str, str]:
    """Runs `python main.py ARGUMENTS` to its end and returns its two outputs; the exit status must be `expect`.

    Other options and environment variables are those of `start_main`.
    """
    with start_main(*arguments, **options) as process:
        output, errors = process.communicate(timeout=500)
    assert process.returncode == expect, f"exit status {process.returncode}\n{output}\n{errors}"
    return output, errors


def run_python(
    *arguments: str, env: dict[str, str] | None = None, timeout_secs: float = 500
) -> subprocess.CompletedProcess[str]:
    """Runs `python ARGUMENTS` from the project's root to its end; `env` is by default that of a user."""
    env = make_environment() if env is None else env
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout_secs, check=False)


def find_free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start_processes(count: int, *arguments: str, devices: int = 2, **changes: str) -> list[Process]:
    """Starts `count` processes that are one run, each with `devices` devices."""
    flags = (f"--coordinator=127.0.0.1:{find_free_port()}", f"--num_processes={count}")
    return [
        start_main(*arguments, *flags, f"--process_id={index}", devices=devices, **changes) for index in range(count)
    ]


def wait_for_ends(processes: list[Process], timeout_secs: float = 500) -> list[tuple[int, str, str]]:
    """Exit status and both outputs of each; what does not end in time is killed and fails the test."""
    with concurrent.futures.ThreadPoolExecutor(len(processes)) as pool:
        try:
            outputs = list(pool.map(lambda process: process.communicate(timeout=timeout_secs), processes))
        finally:
            for process in processes:
                process.kill()
    return [(process.returncode, *texts) for process, texts in zip(processes, outputs, strict=True)]


def run_processes(count: int, *arguments: str, devices: int = 2, expect: int = 0, **changes: str) -> tuple[str, str]:
    """Runs `count` processes as one run to their end; returns what the first one has written."""
    ends = wait_for_ends(start_processes(count, *arguments, devices=devices, **changes))
    assert [status for status, _, _ in ends] == [expect] * count, ends
    assert [output for _, output, _ in ends[1:]] == [""] * (count - 1)
    return ends[0][1:]


def parse_last_line(output: str) -> dict[str, Any]:
    """The JSON object that ends a mode's standard output."""
    return json.loads(output.splitlines()[-1])


def run_for_absent_chips(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a Python program to its end in an environment for compiling for chips that are not here."""
    done = run_python("-c", program, *arguments, env=os.environ | ENVIRONMENT)
    assert done.returncode == 0, done.stderr[-2000:]
    return done
