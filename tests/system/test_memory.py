"""Memory is reported where it is known."""

import os
import pathlib
import types

import jax

from densenet_jax.system.host import memory_used


def test_on_a_cpu_only_the_process_is_measured():
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    used = memory_used()
    assert set(used) == {"host_memory_bytes"}
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0.9 * pages * os.sysconf("SC_PAGE_SIZE") < used["host_memory_bytes"] <= machine


def test_the_fullest_device_counts(monkeypatch):
    devices = [types.SimpleNamespace(memory_stats=lambda peak=peak: {"peak_bytes_in_use": peak}) for peak in (5, 9, 7)]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    assert memory_used()["memory_bytes"] == 9
