"""What a terminal of 80 columns keeps, and what happens when it is gone."""

import io
import os
import subprocess
import sys

import pytest
from rich.console import Console

from densenet_jax.system import console
from tests.main_processes import ROOT


@pytest.mark.parametrize(("columns", "kept", "dropped"), [(80, "lr 0.1", "waiting"), (200, "waiting 3%", "nothing")])
def test_a_narrow_terminal_keeps_step_loss_rate_and_time_left(monkeypatch, columns, kept, dropped):
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, width=columns, emoji=False, legacy_windows=False)
    monkeypatch.setattr(console, "_console", terminal)
    bar = console.Bar("training", 90_000)
    bar.advance(1234)
    bar.figures("loss 2.3026", "1234 images/s", "lr 0.1", "top-1 of mixed images 12.34%", "epoch 12.3", "waiting 3%")
    bar._progress.refresh()
    bar.close()
    for text in ("1234/90000", "loss 2.3026", "1234 images/s", "left ", kept):
        assert text in screen.getvalue()
    assert dropped not in screen.getvalue()


def test_messages_are_printed_verbatim(capsys):
    console.print_status("[bold]/data/:smile:/x[/bold]")
    assert capsys.readouterr().err == "[bold]/data/:smile:/x[/bold]\n"


WRITES = (
    "from densenet_jax.system.console import print_status\nfor _ in range(9): print_status('x' * 4000)\nprint('done')"
)


@pytest.mark.parametrize("redirected", ["2>&-", "2>/dev/full", "2> >(true)"])
def test_a_lost_terminal_ends_nothing(redirected):
    command = f'"{sys.executable}" -c "{WRITES}" {redirected}'
    result = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu"}, capture_output=True, text=True
    )
    assert (result.returncode, result.stdout) == (0, "done\n")


def test_closed_streams_are_opened_so_that_no_file_takes_their_place(tmp_path):
    code = (
        "import os, sys; from densenet_jax.__main__ import open_standard_streams; open_standard_streams();"
        "file = open('x', 'w'); print(file.fileno(), file=file); sys.stdout.flush(); sys.stderr.flush();"
        "os.write(1, b'lost'); os.write(2, b'lost')"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = f'"{sys.executable}" -c "{code}" <&- >&- 2>&-'
    subprocess.run(["bash", "-c", command], cwd=tmp_path, env=environment, check=True)
    assert int((tmp_path / "x").read_text()) > 2
