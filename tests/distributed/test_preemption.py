"""Signals that ask a run to stop are remembered until the step is done."""

import os
import signal

import pytest

from densenet_jax.distributed.preemption import StopRequest


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_is_remembered_until_the_step_is_done(number, capsys):
    before = signal.signal(number, signal.default_int_handler)  # under nohup SIGHUP is ignored
    try:
        with StopRequest() as stop:
            assert not stop.due(1)
            os.kill(os.getpid(), number)
            assert stop.due(2)
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, before)
    assert capsys.readouterr().err == f"{number.name} received: saving after this step\n"


def test_nohup_stays_in_force():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.due(1)
    finally:
        signal.signal(signal.SIGHUP, before)
