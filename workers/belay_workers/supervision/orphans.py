"""Kill orphans: the processes that the node of a dead child had started.

The worker's parent process is a subreaper, so orphans become its children when the child dies. They
must be dead before the run continues or is ended. Otherwise a cancelled node would continue in a
subprocess, or run beside the next attempt. `setsid`, process groups and double forks make no
difference.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Collection
from contextlib import suppress

import psutil

from belay_workers.supervision import processes

log = logging.getLogger(__name__)

#: Seconds after which the killing ends, if orphans start new processes faster than they are killed.
_KILL_SECONDS = 2.0
_LOOK_SECONDS = 0.005


class Orphans:
    """The orphans of one worker. Created in its parent process before the pool forks."""

    def __init__(self, children: Callable[[], Collection[int]]) -> None:
        """`children` returns the ids of the pool's processes; each is included before it becomes a
        group leader. Processes that the parent has started already (a graph may start some at its
        import) are kept."""
        self._children = children
        self._kept = {process.pid for process in psutil.Process().children()}

    def keep(self, pid: int) -> None:
        """Never kill this process: the parent has started it for itself."""
        self._kept.add(pid)

    def kill(self, dead: int) -> None:
        """Kill the processes that a dead child has left, its process group first.

        Return after 2 s with an error in the log if some are still running.
        """
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(dead, processes.SIGKILL)
        ends_at = time.monotonic() + _KILL_SECONDS
        while orphans := self._find() or self._find():
            for process in orphans:
                processes.kill_with_descendants(process)
                _reap(process.pid)
            if time.monotonic() > ends_at:
                log.error(
                    "child %d left %d processes that could not be killed; leaving them running",
                    dead,
                    len(orphans),
                )
                return
            time.sleep(_LOOK_SECONDS)

    def _find(self) -> list[psutil.Process]:
        """Return the parent's child processes that it has not started itself. The children of a
        zygote that was killed are among them until they have been replaced."""
        found = []
        below = processes.children(os.getpid())
        made = {*self._children(), *self._kept}
        for pid in below:
            with suppress(ProcessLookupError, psutil.NoSuchProcess):
                if pid in made:
                    continue
                process = psutil.Process(pid)
                if process.status() == psutil.STATUS_ZOMBIE and not _reap(process.pid):
                    continue
                if process.is_running():
                    found.append(process)
        return found


def _reap(pid: int) -> bool:
    """Wait for a process without blocking. Return False if it has not ended yet."""
    with suppress(ChildProcessError):
        return os.waitpid(pid, os.WNOHANG)[0] == pid
    return True
