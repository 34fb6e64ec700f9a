"""A process that keeps what it frees: on a CPU, unless the user has said otherwise."""

import os
import subprocess
import sys

import pytest

from densenet_jax.system import host

FAULTS = """
import ctypes, resource, sys
from densenet_jax.system.host import keep_freed_memory
print(keep_freed_memory())
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, (ctypes.c_void_p,)
size = 64 * 2**20

def use():
    block = libc.malloc(size)
    ctypes.memset(block, 1, size)
    libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

before = use()
print(use() - before)
"""


def run(**variables):
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", FAULTS], env=environment | variables, capture_output=True, text=True, check=True
    )
    kept, faults = done.stdout.split()
    return kept == "True", int(faults)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc is Linux'")
def test_a_freed_block_is_used_again_without_new_pages(monkeypatch):
    kept, faults = run()
    assert kept is (not host.has_accelerator())
    assert faults < 100 or not kept


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc is Linux'")
def test_mallocs_own_variables_and_accelerators_change_nothing(monkeypatch):
    kept, faults = run(MALLOC_MMAP_THRESHOLD_="1000000")
    assert not kept
    assert faults > 1000
    monkeypatch.setattr(host, "_TPU", ("/dev/null",))
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    assert host.keep_freed_memory() is False


BLOCKS = """
import ctypes, random, sys
from densenet_jax.system.host import keep_freed_memory, restart_without_thread_caches
if sys.argv[1] == "restart":
    restart_without_thread_caches()
keep_freed_memory()
libc, random = ctypes.CDLL(None), random.Random(0)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, (ctypes.c_void_p,)
small = [libc.malloc(random.randrange(16, 3000)) for _ in range(4096)]

def change_some():
    for _ in range(200):
        i = random.randrange(len(small))
        libc.free(small[i])
        small[i] = libc.malloc(random.randrange(16, 3000))

places = set()
for _ in range(14):
    block = ctypes.c_void_p()
    libc.posix_memalign(ctypes.byref(block), 64, 64 * 2**20)
    change_some()
    libc.free(block)
    change_some()
    places.add(block.value)
print(len(places))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc is Linux'")
@pytest.mark.skipif(host.has_accelerator(), reason="malloc is left as it is")
def test_an_aligned_block_is_found_again_without_thread_caches():
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", BLOCKS]
    with_caches, without = (
        int(subprocess.run([*command, way], env=environment, capture_output=True, text=True, check=True).stdout)
        for way in ("as it is", "restart")
    )
    assert without <= 2
    assert without < with_caches


@pytest.mark.parametrize(
    ("arguments", "command", "own"),
    [
        (["main.py", "--mode=train"], ["main.py", "--mode=train"], True),
        (["main.py"], ["-X", "utf8", "main.py"], True),
        (["/lib/densenet_jax/__main__.py", "--mode=train"], ["-m", "densenet_jax", "--mode=train"], True),
        (["main.py", "--mode=train"], ["-m", "pytest", "-q"], False),
        (["main.py"], ["-B", "-c", "from multiprocessing.forkserver import main; main(3, 4)"], False),
    ],
)
def test_a_process_that_was_started_for_something_else_does_not_start_anew(arguments, command, own):
    assert host._is_command(arguments, command) is own
