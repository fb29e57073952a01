"""Copies of a process that executes runs, which the code of a run may make by `os.fork`."""

from __future__ import annotations

import os


def end_copy(pid: int) -> None:
    """End this process unless it has the id `pid`, which was read before the code of a run was
    executed. Else it is a copy that the code has made and returned from: it would go on with the
    run, and with its connections, beside the process that was copied."""
    if os.getpid() != pid:
        os._exit(1)
