"""Lines of libraries that are not for the user are dropped."""

import os

from densenet_jax.system import logs


def test_an_idle_cuda_plugin_is_loaded_without_its_lines(monkeypatch, capfd):
    def start() -> None:
        os.write(2, b"Could not find cuda drivers\n")

    monkeypatch.setattr(logs, "has_nvidia", lambda: False)
    monkeypatch.setattr(logs.importlib.util, "find_spec", lambda name: None)
    logs.start_quietly(lambda: 1 / 0)  # without the plugin JAX starts when it is needed
    monkeypatch.setattr(logs.importlib.util, "find_spec", lambda name: name)
    logs.start_quietly(start)
    assert capfd.readouterr().err == ""
    start()
    assert capfd.readouterr().err == "Could not find cuda drivers\n"
