"""What is left of a child that somebody else has killed: the processes that its node had started.

The worker's parent is a subreaper, so they become its children when theirs dies. They must be dead
before the run goes on or is ended: else a cancelled node works on in a subprocess, or beside the
next attempt. `setsid`, process groups and double forks make no difference.
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

#: How long what starts others faster than it is killed is fought with.
_KILL_SECONDS = 2.0
_LOOK_SECONDS = 0.005


class Orphans:
    """Of one worker; made in its parent before the pool forks."""

    def __init__(self, children: Callable[[], Collection[int]]) -> None:
        """`children`: the ids of the pool's own processes, each from before it is a group leader.
        What the parent has started until now (a graph may have, at its import) stays."""
        self._children = children
        self._kept = {process.pid for process in psutil.Process().children()}
        #: Children that have died, until the pool has taken their status: it would wait for ever
        #: for one that somebody else has taken.
        self._dead: set[int] = set()

    def keep(self, pid: int) -> None:
        """A process of the parent's own."""
        self._kept.add(pid)

    def kill(self, dead: int) -> None:
        """Kill what a dead child has left, its process group first."""
        self._dead.add(dead)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(dead, processes.SIGKILL)
        ends_at = time.monotonic() + _KILL_SECONDS
        while orphans := self._find() or self._find():
            for process in orphans:
                processes.kill_tree(process.pid)
                _reap(process.pid)
            if time.monotonic() > ends_at:
                log.error("child %d left %d processes that do not end", dead, len(orphans))
                return
            time.sleep(_LOOK_SECONDS)

    def _find(self) -> list[psutil.Process]:
        """Children of the parent's that it has not made. A child that was just forked is still in
        the parent's own group; one that has left it has its slot already."""
        ours = os.getpgid(0)
        found = []
        below = processes.children(os.getpid())
        self._dead = {pid for pid in self._dead if _is_still_to_be_taken(pid)}
        made = {*self._children(), *self._kept, *self._dead}
        for pid in below:
            with suppress(ProcessLookupError, psutil.NoSuchProcess):
                if pid in made or os.getpgid(pid) == ours:
                    continue
                process = psutil.Process(pid)
                if process.status() == psutil.STATUS_ZOMBIE and not _reap(process.pid):
                    continue
                if process.is_running():
                    found.append(process)
        return found


def _is_still_to_be_taken(pid: int) -> bool:
    """Whether a child that has died is still there for the pool to take its status."""
    try:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def _reap(pid: int) -> bool:
    """Take a dead process's status, which nobody else waits for. False: it is not dead yet."""
    with suppress(ChildProcessError):
        return os.waitpid(pid, os.WNOHANG)[0] == pid
    return True
