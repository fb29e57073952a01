"""Test that a stopped process is killed with all processes below it, without a scan of others."""

from __future__ import annotations

import subprocess
import sys
from contextlib import contextmanager

import psutil
import pytest

from belay_workers.supervision import processes
from tests.waiting import wait_until

needs_lists = pytest.mark.skipif(
    not processes._HAS_LISTS, reason="the kernel has no lists of children"
)
#: Starts as many processes as the argument says, each of which starts one in another session.
_PROGRAM = """
import subprocess, sys, time
inner = "import subprocess, time; subprocess.Popen(['sleep', '60'], start_new_session=True).wait()"
for _ in range(int(sys.argv[1])):
    subprocess.Popen([sys.executable, "-S", "-E", "-c", inner])
time.sleep(60)
"""


@contextmanager
def tree(width):
    root = subprocess.Popen([sys.executable, "-S", "-E", "-c", _PROGRAM, str(width)])
    try:
        wait_until(lambda: len(processes.descendants(root.pid)) == 2 * width, 60, "the tree")
        yield root
    finally:
        for process in processes.descendants(root.pid):
            process.kill()
        root.kill()
        root.wait()


def test_everything_below_a_stopped_process_is_killed_with_it():
    with tree(5) as root:
        below = processes.descendants(root.pid)
        assert processes.stop(root.pid)
        processes.kill_tree(root.pid)
        root.wait(20)
        assert psutil.wait_procs(below, timeout=20)[1] == []


def test_the_descendants_are_those_that_psutil_finds():
    with tree(3) as root:
        assert set(processes.descendants(root.pid)) == set(
            psutil.Process(root.pid).children(recursive=True)
        )


@needs_lists
def test_processes_outside_the_tree_are_not_examined(monkeypatch):
    """A scan of all processes for each that is killed delayed the cancels of other runs."""
    with tree(5) as root:

        def scan():
            raise AssertionError("all processes of the system are examined")

        monkeypatch.setattr(psutil, "pids", scan)
        monkeypatch.setattr(psutil, "_ppid_map", scan)
        assert len(processes.descendants(root.pid)) == 10
        processes.stop(root.pid)
        processes.kill_tree(root.pid)
        root.wait(20)


def test_a_process_that_does_not_exist_has_no_descendants():
    assert processes.descendants(2**22 + 1) == []
