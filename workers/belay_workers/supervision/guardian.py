"""Kill the children of a worker whose parent process was killed or is stopped, and all that they
started.

When the parent dies, the kernel stops its children (SIGSTOP, through `PR_SET_PDEATHSIG`) instead of
killing them. The processes started by a killed child would lose their parent, could not be found,
and would continue to run. The guardian, a separate process, detects the parent's death, finds the
processes below each stopped child, and kills them all before the runs' leases lapse.

A parent that is not executed (SIGSTOP, a machine that swaps) does not renew leases either: another
worker will end or execute its runs. The guardian kills the children before that.

It is a program of its own, which takes less memory than a forked process: the parent soon changes
the pages that both would share.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress

import psutil

from belay_server.configuration.command_lines import guardian_command
from belay_workers.child.signals import ENDING
from belay_workers.slots import SlotTable
from belay_workers.supervision import processes

log = logging.getLogger(__name__)

#: Seconds during which children are searched for; some may be in the middle of a fork or a stop.
_LOOK_SECONDS = 2.0
_PAUSE_SECONDS = 0.05
_LOOK_AT_PARENT_MS = 250


class Guardian:
    """The guardian process. Call `ensure` and `stop` on the main thread."""

    def __init__(self, slots: SlotTable, *, unsupervised_seconds: float) -> None:
        """The children are killed when they have not been supervised for so long."""
        self._slots = slots
        self._seconds = unsupervised_seconds
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """Return its process id, None if it was not started."""
        return None if self._process is None else self._process.pid

    def ensure(self) -> bool:
        """Start the guardian unless it is running. Return True when it was started."""
        if self._process is not None:
            if self._process.poll() is None:
                return False
            log.warning("the guardian of this worker's children has ended; starting it again")
        watched = os.pidfd_open(os.getpid())
        # It ignores these signals once it has started.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
        try:
            self._process = self._start(watched)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            os.close(watched)
        return True

    def _start(self, watched: int) -> subprocess.Popen[bytes]:
        descriptors = (watched, self._slots.fileno())
        command = guardian_command(*descriptors, parent=os.getpid(), seconds=self._seconds)
        return subprocess.Popen(  # noqa: S603  (a program of Belay's own)
            command, stdin=subprocess.DEVNULL, pass_fds=descriptors, start_new_session=True
        )

    def stop(self) -> None:
        """Kill the guardian. Call it after the parent has ended its children."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def guard(watched: int, slots: SlotTable, parent: int, seconds: float) -> None:
    """Guard the children until the parent has died, which makes the descriptor `watched` readable.

    They are killed, too, when they have not been supervised for so many seconds.
    """
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
    poller = select.poll()
    poller.register(watched, select.POLLIN)
    while not poller.poll(_LOOK_AT_PARENT_MS):
        if slots.unsupervised_seconds > seconds:
            for child in slots.pids():
                processes.stop(child)
                processes.kill_tree(child)
    _end_children_of(parent, slots)


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


if __name__ == "__main__":
    _watched, _slots, _parent, _seconds = sys.argv[1:]
    guard(int(_watched), SlotTable.of_descriptor(int(_slots)), int(_parent), float(_seconds))
