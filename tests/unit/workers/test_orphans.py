"""Test that orphans are killed and reaped, and that children with a slot are not."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import os, signal, subprocess, sys, time
from pathlib import Path

import psutil

from belay_workers.supervision import processes
from belay_workers.supervision.orphans import Orphans

processes.become_reaper()
slots = []
early = subprocess.Popen(["sleep", "60"], start_new_session=True)  # started by the parent before
orphans = Orphans(lambda: slots)


def child(work):
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        os.write(write, b"%d" % work())
        os.close(write)
        time.sleep(60)
    slots.append(pid)
    return pid, int(os.read(read, 20))


def daemon():
    return subprocess.Popen(["sleep", "60"], start_new_session=True).pid


def same_group():
    return subprocess.Popen(["sleep", "60"], process_group=parents_group).pid


parents_group = os.getpgid(0)


def nothing():
    return 0


def state(pid):
    try:
        return psutil.Process(pid).status()
    except psutil.NoSuchProcess:
        return "gone"


first, its_daemon = child(daemon)
second, other_daemon = child(daemon)
third, its_other = child(same_group)
for pid in (first, third):
    os.kill(pid, signal.SIGKILL)
while state(first) != "zombie" or state(third) != "zombie":
    time.sleep(0.01)
orphans.kill(first)
slots.remove(first)
print(state(its_daemon), state(other_daemon), state(early.pid))
orphans.kill(third)
slots.remove(third)
# Those that have a slot are reaped by others, or later.
print(state(first), os.waitpid(third, 0)[1], state(its_other))
os.kill(second, signal.SIGKILL)
while state(second) != "zombie":
    time.sleep(0.01)
orphans.kill(second)
print(state(other_daemon), state(second))
os.waitpid(second, 0)
early.kill()
"""


def test_only_the_orphans_of_a_dead_child_are_killed():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=50, check=False
    )
    assert done.stdout.splitlines() == [
        "gone sleeping sleeping",
        "gone 9 gone",
        "gone zombie",
    ], done.stderr
