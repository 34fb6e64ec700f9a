"""Both native libraries pass their tests under AddressSanitizer and UndefinedBehaviorSanitizer."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
FILES = {  # each library is compiled once
    "kernels": tuple(f"test_cpu{name}.py" for name in ("", "_dense_layer", "_elementwise", "_bfloat16", "_int8")),
    "data": ("test_native.py",),
}
# Not optimized: that takes a quarter of the time to compile, and no access is left out.
FLAGS = "-O0 -g1 -fsanitize=address,undefined -fno-sanitize-recover=undefined"
# What reads or writes memory; the rest of these files is about Python or about whole networks.
WANTED = (
    "convolution or reader or norm_relu_conv or pooling or refuse or part or crop or passes or crash or tiny"
    " or dense_layer or elementwise or plainly or in_bfloat16 or in_int8 or in_one_call"
)


@pytest.mark.slow
@pytest.mark.parametrize("room", FILES)
def test_a_native_library_s_tests_pass_under_sanitizers(room, shared_folder, tmp_path):
    compiler = shutil.which("gcc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs gcc's sanitizers")
    names = ("libasan.so", "libubsan.so")
    runtimes = [subprocess.check_output([compiler, f"-print-file-name={name}"], text=True).strip() for name in names]
    if not all(os.path.isabs(path) for path in runtimes):
        pytest.skip("gcc has no sanitizers here")
    # As a session of its own: others share the library that they have compiled without sanitizers. XLA's programs, none
    # of which is ours, are those that the quick tests have compiled, if they have.
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    (shared_folder / "cache").mkdir(exist_ok=True)
    (tmp_path / "cache").symlink_to(shared_folder / "cache")
    environment = own | {
        **{"CC": "gcc", "CXX": "g++", "CFLAGS": FLAGS, "CXXFLAGS": FLAGS, "JAX_PLATFORMS": "cpu"},
        "LD_PRELOAD": ":".join(runtimes),
        # Python and XLA keep memory to their end; XLA's own compilers mix allocators.
        # Freed memory is kept until 16 MB more are freed, and not 256, which no cache holds; reports tell less of where
        # memory was taken.
        "ASAN_OPTIONS": "detect_leaks=0:alloc_dealloc_mismatch=0:malloc_context_size=1:quarantine_size_mb=16",
        "FUZZ_ROUNDS": "30",
        "DENSENET_JAX_TESTS_SHARED": str(tmp_path),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "--capture=sys", "-k", WANTED]
    command += [f"tests/{room}/{file}" for file in FILES[room]]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1500, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert " passed" in done.stdout
    assert " skipped" not in done.stdout
