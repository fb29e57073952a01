"""End the server process of `multiprocessing`'s start method `forkserver` with the run that used
it, so that the next run in the same child starts another."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress


def end_forkserver() -> None:
    """Kill the process, if this one has started it, and let `multiprocessing` forget it.

    Otherwise `multiprocessing` waits for a process that has been killed and reaped, which fails
    with ChildProcessError in every later use.
    """
    module = sys.modules.get("multiprocessing.forkserver")
    if module is None:
        return
    server = module._forkserver
    with suppress(OSError):  # a node has ended it, or taken its descriptor or socket
        if server._forkserver_pid is not None:
            os.kill(server._forkserver_pid, signal.SIGKILL)
        server._stop()
    server._forkserver_pid = None
