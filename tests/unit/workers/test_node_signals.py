"""Test that what a node does to the signals of its process ends with the node."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap

import pytest

SETUP = """
import logging, os, signal, sys, time
from belay_workers.child.signals import NodeSignals
logging.basicConfig(level="WARNING", stream=sys.stdout, format="%(message)s")
ours = lambda *_: print("ours")
signal.signal(signal.SIGURG, ours)
signals = NodeSignals()
"""


def output_of(code: str) -> str:
    """Run code in a process of its own: a timer that is left would end this one."""
    command = [sys.executable, "-c", SETUP + textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_timers_are_stopped():
    code = """
        for timer in (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF):
            signal.setitimer(timer, 1000, 1000)
        signals.restore()
        print([signal.getitimer(n) for n in range(3)])
    """
    assert output_of(code) == "[(0.0, 0.0), (0.0, 0.0), (0.0, 0.0)]\n"


@pytest.mark.parametrize("number", [signal.SIGALRM, signal.SIGURG, signal.SIGUSR1, signal.SIGTERM])
@pytest.mark.parametrize("handler", ["print", "signal.SIG_IGN", "signal.SIG_DFL"])
def test_handlers_and_the_mask_are_restored(number, handler):
    code = f"""
        before = signal.getsignal({number})
        signal.signal({number}, {handler})
        signal.pthread_sigmask(signal.SIG_BLOCK, [{number}])
        signals.restore()
        print(signal.getsignal({number}) is before, signal.pthread_sigmask(signal.SIG_BLOCK, ()))
    """
    assert output_of(code) == "True set()\n"


def test_a_handler_that_raises_meanwhile_does_not_prevent_it():
    code = """
        def interrupt(*_):
            raise KeyError("late")

        def restored():
            calls.append(1)
            if len(calls) == 1:
                signal.raise_signal(signal.SIGALRM)
            restore()

        calls, restore = [], signals._restore
        signals._restore = restored
        signal.signal(signal.SIGALRM, interrupt)
        signals.restore()
        print(signal.getsignal(signal.SIGALRM) is signal.SIG_DFL, len(calls))
    """
    warning = "a signal handler of a node raised after the node's end: KeyError('late')"
    assert output_of(code) == f"{warning}\nTrue 2\n"
