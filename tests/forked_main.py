"""Starts `main.py` in processes that are forked from one that has imported everything, which spares 2 s of imports.

A forked process differs from `python main.py` in nothing that a test looks at: it has its own arguments, environment,
output, signals and exit, and JAX starts its backend anew. Only what is read at import must be as in the server.
"""

import atexit
import importlib
import io
import multiprocessing
import os
import pathlib
import re
import runpy
import signal
import subprocess
import sys
import threading
from multiprocessing.connection import Connection

import jax

ROOT = pathlib.Path(__file__).parent.parent
# Read when they are needed, so that each process can have its own; all others must be as in the server.
_READ_LATE = re.compile(
    "TFDS_DATA_DIR|XDG_CACHE_HOME|XLA_FLAGS|COLUMNS|PYTEST_CURRENT_TEST|JAX_ENABLE_X64|SLURM_.*|TESTS_NO_REPORT"
)
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.forked_main_imports"])
_server_environment: dict[str, str] = {}


def can_fork(environment: dict[str, str]) -> bool:
    """Whether a forked process can have this environment; the first one asked for becomes the server's."""
    fixed = {key: value for key, value in environment.items() if not _READ_LATE.fullmatch(key)}
    if not _server_environment:
        _server_environment.update(fixed)
    return fixed == _server_environment


class ForkedMain:
    """`main.py` in a forked process, with the part of `subprocess.Popen` that the tests use."""

    def __init__(self, arguments: tuple[str, ...], environment: dict[str, str], folder: pathlib.Path = ROOT):
        self.args = ["main.py", *arguments]
        readers, writers = zip(*(_context.Pipe(duplex=False) for _ in range(2)), strict=True)
        self._process = _context.Process(target=_run, args=(arguments, environment, folder, *writers))
        here = dict(os.environ)
        os.environ.clear()
        os.environ.update(environment)  # of the server, where this starts it
        try:
            self._process.start()
        finally:
            os.environ.clear()
            os.environ.update(here)
        for writer in writers:
            writer.close()
        self.stdout, self.stderr = (
            io.TextIOWrapper(io.FileIO(os.dup(reader.fileno())), encoding="utf-8") for reader in readers
        )
        for reader in readers:
            reader.close()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        texts = ["", ""]

        def read(index: int, stream: io.TextIOWrapper) -> None:
            with stream:
                texts[index] = stream.read()

        threads = [
            threading.Thread(target=read, args=(index, stream), daemon=True)
            for index, stream in enumerate((self.stdout, self.stderr))
        ]
        for thread in threads:
            thread.start()
        self.wait(timeout)
        for thread in threads:
            thread.join(timeout)
        return texts[0], texts[1]

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def __enter__(self) -> "ForkedMain":
        return self

    def __exit__(self, *_: object) -> None:
        self.stdout.close()
        self.stderr.close()
        self.wait()


def _run(
    arguments: tuple[str, ...],
    environment: dict[str, str],
    folder: pathlib.Path,
    output: Connection,
    errors: Connection,
) -> None:
    """Becomes `python main.py ARGUMENTS` in `folder` and ends as Python ends."""
    from tensorflow_datasets.core import constants  # the server has imported it; who imports this module need not

    for number, connection in ((1, output), (2, errors)):
        os.dup2(connection.fileno(), number)
        connection.close()
    os.environ.clear()
    os.environ.update(environment)
    jax.config.update("jax_enable_x64", environment.get("JAX_ENABLE_X64") == "1")
    constants.DATA_DIR = constants.get_default_data_dir()
    if environment.get("TESTS_NO_REPORT"):
        importlib.import_module("densenet_jax.report.run").report_run = lambda *_: None
    os.chdir(folder)
    sys.argv = ["main.py", *arguments]
    sys.path[0] = str(folder)
    status: object = 0
    try:
        runpy.run_path("main.py", run_name="__main__")
    except SystemExit as end:
        status = end.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status if isinstance(status, int) else 1)
