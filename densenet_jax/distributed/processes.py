"""Starts several processes as one run, and ends all of them where one ends early.

JAX's distributed service ends a process with abort() when another is lost, whatever it is doing. Here it then prints
one readable line last and exits with a meaningful status.
"""

import contextlib
import itertools
import json
import os
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jax
from jax import config as jax_settings
from jax._src import distributed  # its client is the processes' key-value store

from densenet_jax.distributed.abort import LastWord
from densenet_jax.distributed.cluster import Cluster
from densenet_jax.distributed.preemption import Preempted
from densenet_jax.errors import UserError, first_line
from densenet_jax.system.console import redirect

_JOIN_SECS = 30  # to wait for all processes; JAX adds up to ten
_SILENCE_SECS = 30  # without a heartbeat until a process counts as dead
_LONG_SECS = 3600  # for slow work: one process compiles, or process 0 writes the final report
_POLL_SECS = 1.0
_abandons_threads = False
_NUMBERS = itertools.count()  # makes each barrier's name unique
_ENDED = "densenet_jax/ended"
_LOST = re.compile(r"gloo|nccl|socket closed|connection (?:closed|reset|refused)|coordination service", re.IGNORECASE)
_AGAIN = "start all of them again: training goes on from the newest checkpoint."


def several() -> bool:
    """Returns whether this process has joined others."""
    return jax.distributed.is_initialized()


def is_first() -> bool:
    """Returns whether this is process 0, which prints and writes; uses no device, and works after they have parted."""
    return distributed.global_state.process_id == 0


def wait_for_all(what: str) -> None:
    """Returns once every process has called this; `what` names the barrier.

    No exchange between devices, which times out (gloo after 30 seconds) while one process compiles for longer.
    """
    if several():
        _client().wait_at_barrier(f"densenet_jax/{what}/{next(_NUMBERS)}", 1000 * _LONG_SECS)


def check_same(what: str, text: str) -> None:
    """Checks that every process has the same `text`.

    Raises:
        UserError: this process's differs from process 0's.
    """
    if not several():
        return
    key = f"densenet_jax/same/{what}"
    if jax.process_index() == 0:
        _client().key_value_set(key, text)
    first = _client().blocking_key_value_get(key, 1000 * _JOIN_SECS)
    if first != text:
        pairs = zip(first.splitlines(), text.splitlines(), strict=False)
        one, other = next(((a, b) for a, b in pairs if a != b), ("", ""))
        raise UserError(
            f"process 0 and process {jax.process_index()} on {socket.gethostname()} have other {what} "
            f"({one} there, {other} here); start the same command and code everywhere."
        )
    wait_for_all(f"the same {what}")


def try_for(secs: float, what: Callable[[], object]) -> None:
    """Calls `what`, which needs all processes; gives up after `secs`, as the others may be elsewhere."""
    if not several():
        what()
        return

    def trying() -> None:
        with contextlib.suppress(Exception):  # the earlier failure is what counts
            what()

    thread = threading.Thread(target=trying, daemon=True)
    thread.start()
    thread.join(secs)


@contextlib.contextmanager
def join(cluster: Cluster | None, *, stops_together: bool = False) -> Iterator[None]:
    """Joins the processes of `cluster`: inside, `jax.devices()` are those of all. None does nothing.

    A `UserError` inside ends the other processes too, with its message; end this one with `leave`. Any other
    error ends all of them from here. With `stops_together`, JAX handles SIGTERM and all processes are `Preempted`
    together; see `preemption.StopRequest`.

    Raises:
        UserError: not all of them came in time.
    """
    if cluster is None:
        yield
        return
    last_word = LastWord()
    last_word.begin()
    with _only_the_result_on_stdout():
        _connect(cluster, last_word, stops_together)
        last_word.change(f"a process of this run has died or can't be reached (see above); {_AGAIN}", 1)
        watch = _Watch()
        watch.start()
        try:
            yield
        except Preempted:
            _part(watch, last_word)
            raise
        except UserError as error:
            watch.stop()
            _announce_end(2, str(error))
            raise
        except KeyboardInterrupt:
            watch.stop()
            _announce_end(130, "interrupted")
            _end("interrupted", 130, prefix="")
        except BaseException as error:
            _end_of_fault(error, watch)
        _part(watch, last_word)


def abandon_threads() -> None:
    """Makes `leave` end the process at once: Python's own end aborts while a daemon thread is in native code."""
    global _abandons_threads
    _abandons_threads = True


def leave(status: int) -> NoReturn:
    """Ends this process; where it has failed and others exist, without waiting for them."""
    if several() or _abandons_threads:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def _connect(cluster: Cluster, last_word: LastWord, stops_together: bool) -> None:
    jax_settings.update("jax_enable_preemption_service", stops_together)
    who = f"process {cluster.index}" if cluster.index is not None else "this process"
    last_word.change(
        f"the {cluster.count} processes of this run did not come together at {cluster.address} within "
        f"{_JOIN_SECS} s ({who} on {socket.gethostname()} was there); see that all of them are started with the same "
        "--coordinator and --num_processes, each with its own --process_id, and that the port is open.",
        2,
    )
    explicit: dict[str, Any] = {}
    if cluster.coordinator is not None:
        explicit = {
            "coordinator_address": cluster.coordinator,
            "num_processes": cluster.count,
            "process_id": cluster.index,
            "local_device_ids": cluster.local_devices,
            "cluster_detection_method": "deactivate",
        }
    try:
        with last_word.alone():
            jax.distributed.initialize(
                **explicit,
                initialization_timeout=_JOIN_SECS,
                heartbeat_timeout_seconds=_SILENCE_SECS,
                shutdown_timeout_seconds=_LONG_SECS,
            )
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(
            f"process {cluster.index} can't join the others at {cluster.address}: {first_line(error)}; see that the "
            "host is this run's first one and that its port is free."
        ) from error


@contextlib.contextmanager
def _only_the_result_on_stdout() -> Iterator[None]:
    """Redirects standard output to standard error: gloo prints its connections there."""
    sys.stdout.flush()
    with redirect(1, 2):
        try:
            yield
        finally:
            sys.stdout.flush()


def _part(watch: "_Watch", last_word: LastWord) -> None:
    """Waits for the others, then disconnects."""
    watch.stop()
    jax.distributed.shutdown()
    last_word.end()


def _client() -> Any:
    return distributed.global_state.client


def _announce_end(status: int, why: str) -> None:
    """Announces to the other processes that this one ends, and gives them time to read it."""
    about = {"process": jax.process_index(), "host": socket.gethostname(), "status": status, "why": why}
    with contextlib.suppress(Exception):  # no process may be left to read it
        _client().key_value_set(_ENDED, json.dumps(about))
        if jax.process_index() == 0:  # hosts the store, which ends with it
            time.sleep(2.5 * _POLL_SECS)


def _end(message: str, status: int, prefix: str = "error: ") -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os.write(2, f"{prefix}{' '.join(message.split())}\n".encode())
    os._exit(status)


def _end_of_fault(error: BaseException, watch: "_Watch") -> NoReturn:
    if _LOST.search(str(error)):
        time.sleep(2.5 * _POLL_SECS)  # the lost one may have announced why: then the watch ends this process
        watch.stop()
        _end(f"a process of this run has died or can't be reached ({first_line(error)}); {_AGAIN}", 1)
    watch.stop()
    traceback.print_exception(error)
    why = f"{type(error).__name__}: {first_line(error)}"
    _announce_end(1, why)
    _end(f"process {jax.process_index()} on {socket.gethostname()} has failed ({why}), a fault of ours", 1)


class _Watch(threading.Thread):
    """Ends this process when another one announces its end."""

    def __init__(self) -> None:
        super().__init__(daemon=True, name="other processes")
        self._over = threading.Event()

    def run(self) -> None:
        while not self._over.wait(_POLL_SECS):
            try:
                about = json.loads(_client().key_value_try_get(_ENDED))
            except Exception:  # no announcement; if the service itself is lost, JAX reports it
                continue
            if not self._over.is_set():
                where = f"process {about['process']} on {about['host']}"
                _end(f"{where} has ended: {about['why']}", about["status"])

    def stop(self) -> None:
        self._over.set()
