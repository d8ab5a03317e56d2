"""A signal is noted when it comes and obeyed at the next check; a second one ends the process at once."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from launch.signals import Interrupted, Signals

TWICE = """
import os, signal
from launch.signals import Signals
with Signals().taken():
    os.kill(os.getpid(), signal.SIGINT)
    print("noted", flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    print("not reached", flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_raised_at_the_next_check_and_the_handlers_come_back(number: signal.Signals) -> None:
    before, signals = signal.getsignal(number), Signals()

    def sweep() -> None:
        with signals.taken():
            signals.check()
            signal.raise_signal(number)
            steps.append("went on")
            signals.check()
            steps.append("not reached")

    steps: list[str] = []
    with pytest.raises(Interrupted) as raised:
        sweep()
    assert steps == ["went on"]
    assert raised.value.number == number
    assert signal.getsignal(number) is before


def test_a_signal_that_nobody_checked_for_is_raised_at_the_end() -> None:
    with pytest.raises(Interrupted), Signals().taken():
        signal.raise_signal(signal.SIGTERM)


def test_a_library_that_answers_sigterm_with_an_exit_is_an_interruption() -> None:
    with pytest.raises(Interrupted) as raised, Signals().taken():
        raise SystemExit(1)
    assert raised.value.number == signal.SIGTERM


def test_a_second_signal_ends_the_process_at_once() -> None:
    done = subprocess.run([sys.executable, "-c", TWICE], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (128 + signal.SIGTERM, "noted\n")
