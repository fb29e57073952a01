"""Ends the children of a worker whose parent was killed outright, with all that they had started.

When the parent dies, the kernel stops its children (`PR_SET_PDEATHSIG`) instead of killing them:
what a killed child has started is nobody's child then, cannot be found, and works on. The guardian,
a process of its own, sees the death, finds each stopped child's processes below it, and kills them
all. The runs' leases lapse only after that.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import time
from contextlib import suppress

import psutil

from belay_workers.slots import SlotTable
from belay_workers.supervision import processes

log = logging.getLogger(__name__)

#: How long children that are just being forked or stopped are looked for.
_LOOK_SECONDS = 2.0
_PAUSE_SECONDS = 0.05


class Guardian:
    """`ensure` and `stop` are the main thread's, which forks."""

    def __init__(self, slots: SlotTable) -> None:
        self._slots = slots
        self.pid: int | None = None

    def ensure(self) -> bool:
        """Start it, or start it again when somebody has killed it. True when it was started."""
        if self.pid is not None and not _has_ended(self.pid):
            return False
        if self.pid is not None:
            log.warning("the guardian of this worker's children was killed; it is started again")
        parent = os.getpid()
        watched = os.pidfd_open(parent)
        pid = os.fork()
        if pid == 0:
            _guard(watched, parent, self._slots)
        os.close(watched)
        self.pid = pid
        return True

    def stop(self) -> None:
        """The parent has ended its children itself."""
        if self.pid is not None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            with suppress(ChildProcessError):
                os.waitpid(self.pid, 0)
            self.pid = None


def _has_ended(pid: int) -> bool:
    try:
        return os.waitpid(pid, os.WNOHANG)[0] == pid
    except ChildProcessError:
        return True


def _guard(watched: int, parent: int, slots: SlotTable) -> None:
    """The whole life of the guardian; it never returns."""
    try:
        os.setsid()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
            signal.signal(number, signal.SIG_IGN)
        _keep_only({watched, slots.fileno()})
        poller = select.poll()
        poller.register(watched, select.POLLIN)
        while not poller.poll():
            pass
        _end_children_of(parent, slots)
    finally:
        os._exit(0)


def _keep_only(descriptors: set[int]) -> None:
    """It holds no socket, file or pipe of the parent's open; standard error is left to it."""
    edges = sorted({2, *descriptors})
    for low, high in zip(edges, [*edges[1:], 1 << 20], strict=True):
        os.closerange(low + 1, high)


def _end_children_of(parent: int, slots: SlotTable) -> None:
    ends_at = time.monotonic() + _LOOK_SECONDS
    while time.monotonic() < ends_at:
        for pid in {reading.pid for reading in slots.read_all()}:
            if _was_left_by(parent, pid):
                processes.stop(pid)
                processes.kill_tree(pid)
        time.sleep(_PAUSE_SECONDS)


def _was_left_by(parent: int, pid: int) -> bool:
    """A child whose parent is gone: no other process that has its number since."""
    with suppress(psutil.Error, ProcessLookupError):
        process = psutil.Process(pid)
        # Not always stopped yet.
        is_child = os.getpgid(pid) == pid and process.ppid() != parent
        return is_child and process.status() != psutil.STATUS_ZOMBIE
    return False
