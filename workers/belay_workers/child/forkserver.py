"""End the server process of `multiprocessing`'s start method `forkserver` with the run that started
it, so that the next run in the same child starts another."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress


class Forkserver:
    """The server process of `multiprocessing` in a child. Make it before the child's first run."""

    def __init__(self) -> None:
        #: That of the worker's parent, which the project may have started at its import. The child
        #: shares it, and it stays.
        self._inherited = _pid()

    def end(self) -> None:
        """Kill the server process that a run has started, and remove it from `multiprocessing`.

        Otherwise `multiprocessing` waits for a process that has been killed and reaped, which fails
        with ChildProcessError in every later use.
        """
        pid = _pid()
        if pid is None or pid == self._inherited:
            return
        server = sys.modules["multiprocessing.forkserver"]._forkserver
        with suppress(OSError):  # a node has ended it, or taken its descriptor or socket
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)  # it is our child
            os.kill(pid, signal.SIGKILL)
            server._stop()
        server._forkserver_pid = None


def _pid() -> int | None:
    module = sys.modules.get("multiprocessing.forkserver")
    return None if module is None else module._forkserver._forkserver_pid
