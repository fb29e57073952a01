"""Test that the processes of `belay dev` end with it, even those that ignore the stop signal."""

from __future__ import annotations

import os
import sys

import psutil

from belay_server.dev.process_tree import ProcessTree, Program
from tests.waiting import wait_until

#: Ignores the signal. So does its child, which has its own session (as Postgres' backends have).
_STUBBORN = """
import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.fork() == 0:
    os.setsid()
print("ready", flush=True)
time.sleep(600)
"""


def test_a_process_that_does_not_stop_is_killed_with_its_descendants(capfd):
    tree = ProcessTree()
    command = [sys.executable, "-c", _STUBBORN]
    process = tree.start(Program("stubborn", command, os.environ, stop_seconds=0.1))
    [child] = wait_until(lambda: psutil.Process(process.pid).children(), 20, "its child")
    wait_until(lambda: os.getsid(child.pid) == child.pid, 20, "a session of its own")
    tree.stop()
    assert process.returncode is not None
    wait_until(lambda: not child.is_running(), 20, "the end of its child")
    assert "stubborn does not stop, killing it" in capfd.readouterr().out


def test_an_empty_line_is_logged_as_it_is(capfd):
    command = [sys.executable, "-c", "print('first'); print(); print('last'); print()"]
    program = Program("talker", command, os.environ)
    program.start().wait(20)
    assert program.last_line() == "last"
    assert [line.rstrip() for line in capfd.readouterr().out.splitlines()] == [
        "talker   | first",
        "talker   |",
        "talker   | last",
        "talker   |",
    ]
