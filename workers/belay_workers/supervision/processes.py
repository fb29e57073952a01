"""Processes: stopping and killing a child with everything it started, and noticing its death."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
SIGKILL = signal.SIGKILL
#: How long to wait for a SIGSTOP to have taken effect.
_STOP_SECONDS = 0.1
_END_SECONDS = 2.0


def become_reaper() -> None:
    """Orphans of what this process starts stay below it, and can be found."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)


def become_session_and_reaper() -> None:
    """In a new child: a session and group of its own, and orphans of what it starts stay below it.

    So whatever a node starts can be found, and killed, with the child. A group alone would not do:
    when its parent dies, the kernel hangs up and wakes a group of the same session that it has just
    stopped, and a node would take its subprocess, ended by that, for one that is done.
    """
    with suppress(PermissionError):  # already a group leader
        os.setsid()
    become_reaper()


def stop_when_parent_dies() -> None:
    """Rather than be killed, as Celery has it: what this process has started is then still below
    it, where the guardian finds it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGSTOP)


def has_children() -> bool:
    """Whether this process has any, dead ones included; costs no look at other processes."""
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def children(pid: int) -> list[int]:
    """The ids of the processes right below one, now.

    From the kernel's own lists where it has them (`CONFIG_PROC_CHILDREN`), a fraction of a
    millisecond; a look at every process of the machine takes a hundred times that. While children
    end, a list may lack some of the others: whoever must have all looks again.
    """
    tasks = Path(f"/proc/{pid}/task")
    if not (tasks / str(pid) / "children").exists():
        with suppress(psutil.NoSuchProcess):
            return [process.pid for process in psutil.Process(pid).children()]
        return []
    found: list[int] = []
    with suppress(OSError):
        for task in tasks.iterdir():
            with suppress(OSError):  # a thread that has ended
                found += map(int, (task / "children").read_text().split())
    return found


def descendants(pid: int) -> list[psutil.Process]:
    """Everything below a process, now."""
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def end_children() -> None:
    """Kill every process below this one, orphans too, and take the status of those that nobody
    else waits for."""
    while has_children():
        below = descendants(os.getpid())
        for process in below:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        if not below or psutil.wait_procs(below, timeout=_END_SECONDS)[1]:
            return


def stop(pid: int) -> bool:
    """SIGSTOP, and wait until it has taken effect, so that memory can be read at rest."""
    try:
        os.kill(pid, signal.SIGSTOP)
        process = psutil.Process(pid)
        deadline = time.monotonic() + _STOP_SECONDS
        while process.status() not in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.0005)
    except (ProcessLookupError, psutil.NoSuchProcess):
        return False
    return True


def resume(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)


def kill_tree(pid: int) -> None:
    """SIGKILL a process and everything it started, the children it is about to start included.

    The process itself should be stopped first: then nothing new can appear while we look.
    """
    below = descendants(pid)
    with suppress(ProcessLookupError, PermissionError):
        if os.getpgid(pid) == pid:
            os.killpg(pid, signal.SIGKILL)
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    for process in below:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    # Whatever those had started in the moment between looking and killing.
    for process in below:
        for late in descendants(process.pid):
            with suppress(psutil.NoSuchProcess):
                late.kill()


def open_pidfd(pid: int) -> int | None:
    """A descriptor that becomes readable when the process dies; None when it has already."""
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return None
