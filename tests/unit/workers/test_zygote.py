"""Test the process that forks children. Each scene is a program: it forks, and sets handlers."""

from __future__ import annotations

import subprocess
import sys

PREAMBLE = """
import os, signal, sys, time
import psutil
from belay_workers.child.signals import ChildSignals
from belay_workers.pool.child_process import ChildProcess, RunSource
from belay_workers.pool.zygote import CHILD, Zygote
from belay_workers.supervision.processes import stop_when_parent_dies


def wait_for_runs(connection):
    stop_when_parent_dies()
    source = RunSource(connection)
    while source.next_run(has_work=False) is not None:
        pass


def until(condition):
    ends_at = time.monotonic() + 20
    while not (found := condition()):
        assert time.monotonic() < ends_at, "waited too long"
        time.sleep(0.01)
    return found


def pid_of(child):
    return until(lambda: child.receive() and child.pid)


def is_gone(pid):
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def make(body=wait_for_runs, in_use=tuple):
    return Zygote(ChildSignals(), {CHILD: body}, in_use)

"""


def play(scene: str) -> list[str]:
    """Run a scene. Return the lines that it prints."""
    done = subprocess.run(
        [sys.executable, "-c", PREAMBLE + scene],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_children_are_forked_and_reaped():
    scene = """
zygote = make()
children = [ChildProcess(zygote.fork()) for _ in range(3)]
pids = [pid_of(child) for child in children]
print({psutil.Process(pid).ppid() for pid in pids} == {zygote.pid})
for child in children:
    child.close()
until(lambda: not any(map(psutil.pid_exists, pids)))
zygote.stop()
"""
    assert play(scene) == ["True"]


def test_a_child_with_a_slot_is_not_reaped():
    """Its process id must not be used again while the supervisor reads its slot."""
    scene = """
import mmap
shared = mmap.mmap(-1, 8)
zygote = make(in_use=lambda: [int.from_bytes(shared[:], "little")])
child = ChildProcess(zygote.fork())
pid = pid_of(child)
shared[:] = pid.to_bytes(8, "little")
child.close()
until(lambda: psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
pid_of(ChildProcess(zygote.fork()))  # the zygote looks at its children after each request
print(psutil.Process(pid).status())
shared[:] = bytes(8)
until(lambda: not psutil.pid_exists(pid))
zygote.stop()
"""
    assert play(scene) == ["zombie"]


def test_the_end_of_a_zygote_leaves_no_child():
    scene = """
zygote = make()
pids = [pid_of(ChildProcess(zygote.fork())) for _ in range(3)]
zygote.stop()
print(psutil.pid_exists(zygote.pid))
until(lambda: all(map(is_gone, pids)))
"""
    assert play(scene) == ["False"]


def test_the_death_of_the_parent_stops_the_children_and_kills_none():
    """The guardian kills them, with what their nodes have started."""
    scene = """
zygote = make()
child = ChildProcess(zygote.fork())
pid = pid_of(child)
zygote._connection.close()
until(zygote.has_died)
until(lambda: psutil.Process(pid).status() == psutil.STATUS_STOPPED)
print("stopped")
os.kill(pid, signal.SIGKILL)
"""
    assert play(scene) == ["stopped"]


def test_a_failed_fork_harms_no_child():
    scene = """
fork, parent, forks = os.fork, os.getpid(), []

def sometimes():
    if os.getpid() != parent:
        forks.append(1)
        if len(forks) == 2:
            raise BlockingIOError("no process left")
    return fork()

os.fork = sometimes
zygote = make()
first, refused, third = (ChildProcess(zygote.fork()) for _ in range(3))
pid = pid_of(first)
until(lambda: not refused.receive())
print(pid_of(third) != pid, is_gone(pid), zygote.has_died())
zygote.stop()
"""
    assert play(scene) == ["True False False"]


def test_a_project_may_ignore_sigchld():
    """The kernel then reaps the children."""
    scene = """
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
zygote = make(lambda connection: None)
child = ChildProcess(zygote.fork())
until(lambda: not child.receive())
other = ChildProcess(zygote.fork())
until(lambda: not other.receive())
print(psutil.pid_exists(zygote.pid))
"""
    assert play(scene) == ["True"]


def test_signals_that_end_programs_end_neither_the_zygote_nor_its_children():
    scene = """
zygote = make()
child = ChildProcess(zygote.fork())
pid = pid_of(child)
for one in (zygote.pid, pid):
    os.kill(one, signal.SIGTERM)
    os.kill(one, signal.SIGINT)
print(pid_of(ChildProcess(zygote.fork())) != pid, is_gone(pid))
zygote.stop()
"""
    assert play(scene) == ["True False"]
