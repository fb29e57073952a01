"""Stop and kill a child process with everything it started, and detect its death."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

import psutil

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
SIGKILL = signal.SIGKILL
#: Seconds to wait for a SIGSTOP to take effect.
_STOP_SECONDS = 0.1
_END_SECONDS = 2.0
_SEARCH_SECONDS = 0.5


def become_reaper() -> None:
    """Make this process the parent of its orphaned descendants, so that they can be found.

    Does nothing where the system is not Linux.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)


def become_session_and_reaper() -> None:
    """Give a new child its own session and process group, and make it a reaper.

    Everything that a node starts can then be found, and killed, with the child. A process group
    alone is not enough: when its parent dies, the kernel sends SIGHUP and SIGCONT to a stopped
    group of the same session. A node would then treat a subprocess ended by SIGHUP as finished.
    """
    with suppress(PermissionError):  # already a group leader
        os.setsid()
    become_reaper()


def end_when_parent_dies() -> None:
    """Have the kernel kill this process when its parent dies. Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def stop_when_parent_dies() -> None:
    """Have the kernel stop this process when its parent dies.

    The processes it has started stay below it, and the guardian finds them. Linux only.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGSTOP)


def has_children() -> bool:
    """Return True if this process has children, dead ones included.

    One system call: other processes are not examined.
    """
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


#: Whether the kernel lists the children of a process (`CONFIG_PROC_CHILDREN`).
_HAS_LISTS = Path(f"/proc/self/task/{os.getpid()}/children").exists()


def children(pid: int) -> list[int]:
    """Return the ids of a process's direct children.

    They are read from the kernel's lists where it has them, in a fraction of a millisecond; a scan
    of all processes takes a hundred times as long. While children end, a list may omit others: a
    caller that needs all of them has to read twice.
    """
    if not _HAS_LISTS:
        with suppress(psutil.NoSuchProcess):
            return [process.pid for process in psutil.Process(pid).children()]
        return []
    found: list[int] = []
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            with suppress(OSError):  # a thread that has ended
                found += map(int, (task / "children").read_text().split())
    return found


def child_processes(pid: int) -> set[psutil.Process]:
    """Return a process's direct children, as `children` does."""
    found = set()
    for child in children(pid):
        with suppress(psutil.NoSuchProcess):
            found.add(psutil.Process(child))
    return found


def descendants(pid: int) -> list[psutil.Process]:
    """Return all processes below a process; an empty list if it does not exist.

    As with `children`, some may be missing while others end.
    """
    if not _HAS_LISTS:
        with suppress(psutil.NoSuchProcess):
            return psutil.Process(pid).children(recursive=True)
        return []
    found: list[psutil.Process] = []
    parents = [pid]
    while parents:
        for child in child_processes(parents.pop()):
            found.append(child)
            parents.append(child.pid)
    return found


def end_children(keep: Collection[psutil.Process] = ()) -> None:
    """Kill every process below this one but those to keep, orphans included, and wait for them.

    Return at the latest 2 s after a kill, even if a process has not ended.
    """
    while has_children():
        below = _others(keep) or _others(keep)  # a list may omit some, while others end
        for process in below:
            _kill(process)
        if not below or psutil.wait_procs(below, timeout=_END_SECONDS)[1]:
            return


def _others(keep: Collection[psutil.Process]) -> list[psutil.Process]:
    return [process for process in descendants(os.getpid()) if process not in keep]


def stop(pid: int) -> bool:
    """Send SIGSTOP and wait until it has taken effect, so that shared memory does not change.

    Return False if the process does not exist, or has not stopped within 0.1 s.
    """
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
    """Send SIGCONT to a process that `stop` has stopped. Do nothing if it does not exist."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)


def kill_tree(pid: int) -> None:
    """Kill a process and everything below it with SIGKILL.

    Stop the process first (`stop`): it then starts nothing new, and what its descendants start
    during the search stays below it. The search ends after half a second, if they start processes
    faster than they are killed. What is left then has lost its parent: `Orphans` kills it, if the
    worker goes on.
    """
    killed: set[psutil.Process] = set()
    ends_at = time.monotonic() + _SEARCH_SECONDS
    while new := _others_below(pid, killed) or _others_below(pid, killed):
        for process in new:
            _kill(process)
        killed |= new
        if time.monotonic() > ends_at:
            break
    with suppress(ProcessLookupError, PermissionError):
        if os.getpgid(pid) == pid:
            os.killpg(pid, signal.SIGKILL)
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def kill_with_descendants(process: psutil.Process) -> None:
    """Kill a process that is not stopped, and what is below it now."""
    below = descendants(process.pid)
    _kill(process)
    for descendant in below:
        _kill(descendant)


def _others_below(pid: int, known: set[psutil.Process]) -> set[psutil.Process]:
    return set(descendants(pid)) - known


def _kill(process: psutil.Process) -> None:
    with suppress(psutil.NoSuchProcess):
        process.kill()


def seconds_without_core(pid: int) -> float:
    """Return the seconds for which the main thread of a process has been runnable without a core;
    0 for a process that has ended, and where the kernel does not count them (Linux: schedstat)."""
    try:
        _executed, waited, _times = Path(f"/proc/{pid}/schedstat").read_text().split()
    except (OSError, ValueError):
        return 0.0
    return int(waited) / 1e9


def is_stopped(pid: int) -> bool:
    """Return True if a signal has stopped the process."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_STOPPED
    except psutil.Error:
        return False


def open_pidfd(pid: int) -> int | None:
    """Return a descriptor that becomes readable when the process dies; None if it is dead."""
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return None
