"""Native code is compiled by itself: once, reported in one line, and nothing fails because of it."""

import concurrent.futures
import errno
import pathlib

import pytest

from densenet_jax.system import native_build


@pytest.fixture
def built(tmp_path, monkeypatch):
    """Where the library may lie, and a list with an entry for each time that it was compiled."""
    monkeypatch.setenv("DENSENET_JAX_BUILD", "1")
    monkeypatch.delenv("DENSENET_JAX_NATIVE", raising=False)
    return [tmp_path / "package" / "x.so", tmp_path / "cache" / "x.so"], []


def builder(places: list[pathlib.Path], calls: list[int], error: str = ""):
    def build() -> pathlib.Path:
        calls.append(1)
        if error:
            raise RuntimeError(error)
        place = next(place for place in reversed(places) if place.parent.is_dir())
        place.write_text("compiled")
        return place

    return build


def test_many_processes_compile_once_with_one_message(built, capsys):
    places, calls = built
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: native_build.build_at_first_use("it", places, builder(places, calls)), range(4)))
    assert len(calls) == 1
    assert capsys.readouterr().err == "compiled it for this machine, once: 0 s\n"


def test_a_failure_is_reported_once_and_not_tried_again(built, capsys):
    places, calls = built
    for _ in range(2):
        native_build.build_at_first_use("it", places, builder(places, calls, "it\nfails"))
    assert len(calls) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("it can't be compiled here, so it is slower: it fails")


def test_a_compiler_that_comes_later_is_used(built, capsys):
    places, calls = built
    for _ in range(2):
        native_build.build_at_first_use("it", places, builder(places, calls, "no compiler was found"))
    native_build.build_at_first_use("it", places, builder(places, calls))
    first, second = capsys.readouterr().err.splitlines()
    assert first == "it can't be compiled here, so it is slower: no compiler was found"
    assert second.startswith("compiled it for this machine")


def test_it_is_compiled_without_a_writable_cache_and_without_locks(built, capsys, monkeypatch):
    places, calls = built
    places[1].parent.write_text("a file, not a folder")

    def no_locks(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(native_build.fcntl, "flock", no_locks)
    native_build.build_at_first_use("it", places, builder(places, calls))
    assert (len(calls), places[0].exists()) == (1, True)


@pytest.mark.parametrize("variable", ["DENSENET_JAX_BUILD", "DENSENET_JAX_NATIVE"])
def test_it_can_be_switched_off(built, monkeypatch, variable):
    places, calls = built
    monkeypatch.setenv(variable, "0")
    native_build.build_at_first_use("it", places, builder(places, calls))
    assert calls == []


def test_a_wheel_brings_a_compiler_where_there_is_none(monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(native_build.shutil, "which", lambda name: None)
    monkeypatch.setattr(native_build.importlib.util, "find_spec", lambda name: name == "ziglang")
    assert native_build.find_compiler("CXX", "c++", "C++")[1:] == ["-m", "ziglang", "c++"]
    monkeypatch.setattr(native_build.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r"no compiler for C\+\+ was found .* `pip install ziglang` brings one"):
        native_build.find_compiler("CXX", "c++", "C++")


def test_a_compiler_that_hangs_is_reported_in_plain_words(tmp_path, monkeypatch):
    monkeypatch.setattr(native_build, "_BUILD_SECS", 0.2)
    with pytest.raises(RuntimeError, match=r"^bash took longer than 0 s$"):
        native_build.compile_library([tmp_path / "x.so"], ["bash", "-c", "sleep 9"], [])
