"""Kill the children of a worker whose parent process was killed or is stopped, and all that they
started.

When the parent dies, the kernel stops its children (SIGSTOP, through `PR_SET_PDEATHSIG`) instead of
killing them. The processes started by a killed child would lose their parent, could not be found,
and would continue to run. The guardian, a separate process, detects the parent's death, finds the
processes below each stopped child, and kills them all before the runs' leases lapse.

A parent that is not executed (SIGSTOP, a machine that swaps) does not renew leases either: another
worker will end or execute its runs. The guardian kills the children before that.
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

#: Seconds during which children are searched for; some may be in the middle of a fork or a stop.
_LOOK_SECONDS = 2.0
_PAUSE_SECONDS = 0.05
_LOOK_AT_PARENT_MS = 250


class Guardian:
    """The guardian process. Call `ensure` and `stop` on the main thread, which forks."""

    def __init__(self, slots: SlotTable, *, unsupervised_seconds: float) -> None:
        """The children are killed when they have not been supervised for so long."""
        self._slots = slots
        self._seconds = unsupervised_seconds
        self.pid: int | None = None

    def ensure(self) -> bool:
        """Start the guardian unless it is running. Return True when it was started."""
        if self.pid is not None and not _has_ended(self.pid):
            return False
        if self.pid is not None:
            log.warning("the guardian of this worker's children has ended; starting it again")
        parent = os.getpid()
        watched = os.pidfd_open(parent)
        pid = os.fork()
        if pid == 0:
            _guard(watched, parent, self._slots, self._seconds)
        os.close(watched)
        self.pid = pid
        return True

    def stop(self) -> None:
        """Kill the guardian. Call it after the parent has ended its children."""
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


def _guard(watched: int, parent: int, slots: SlotTable, seconds: float) -> None:
    """Run the guardian until the parent has died. Never returns: the process exits."""
    try:
        os.setsid()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
            signal.signal(number, signal.SIG_IGN)
        _keep_only({watched, slots.fileno()})
        poller = select.poll()
        poller.register(watched, select.POLLIN)
        while not poller.poll(_LOOK_AT_PARENT_MS):
            if slots.unsupervised_seconds > seconds:
                for child in slots.pids():
                    processes.stop(child)
                    processes.kill_tree(child)
        _end_children_of(parent, slots)
    finally:
        os._exit(0)


def _keep_only(descriptors: set[int]) -> None:
    """Close all inherited descriptors but these and the standard streams 0 to 2."""
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
    """Return True for a live child of the dead parent.

    It leads its process group and has another parent now, unlike most processes that reuse its id.
    """
    with suppress(psutil.Error, ProcessLookupError):
        process = psutil.Process(pid)
        # Its status is not checked for "stopped": the stop may not have taken effect yet.
        is_child = os.getpgid(pid) == pid and process.ppid() != parent
        return is_child and process.status() != psutil.STATUS_ZOMBIE
    return False
