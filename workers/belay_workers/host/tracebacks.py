"""Dump the tracebacks of all threads later, as code of a run requests of `faulthandler`.

The thread that Python itself has for it reads the frames of the others while they go on. In a
process with several threads that is a segmentation fault sooner or later, which would end all runs.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import sys
import threading
from contextvars import Context
from datetime import timedelta
from typing import Any

from belay_workers.host.gated_run import uninterrupted

log = logging.getLogger(__name__)


class Tracebacks:
    """Replaces `faulthandler.dump_traceback_later`. It does not end the process."""

    def __init__(self) -> None:
        #: Set when the present request is over.
        self._is_over = threading.Event()

    def dump_later(
        self, timeout: float, repeat: bool = False, file: Any = None, exit: bool = False
    ) -> None:
        """Dump them after so many seconds, or again and again, to a file or a descriptor instead of
        standard error. Replaces an earlier request. Raises ValueError."""
        if timeout <= 0:
            raise ValueError("timeout must be greater than 0")
        if exit:
            log.warning("a traceback is dumped in %s s without exit: other runs go on", timeout)
        self.cancel()
        self._is_over = is_over = threading.Event()
        given = sys.stderr if file is None else file
        descriptor = given if isinstance(given, int) else given.fileno()
        args = (timeout, repeat, given, descriptor, is_over)
        thread = threading.Thread(target=_dump, args=args, name="belay-tracebacks", daemon=True)
        uninterrupted(Context().run, thread.start)  # not a thread of the run

    def cancel(self) -> None:
        """Forget the request, if there is one."""
        self._is_over.set()


def _dump(
    timeout: float, repeat: bool, _kept: Any, descriptor: int, is_over: threading.Event
) -> None:
    """Dump them until the request is over. This thread holds the GIL, so the others stand still.
    `_kept` is the file, which must not be collected meanwhile."""
    while not is_over.wait(timeout):
        try:
            os.write(descriptor, f"Timeout ({timedelta(seconds=timeout)})!\n".encode())
            faulthandler.dump_traceback(descriptor, all_threads=True)
        except OSError as error:
            log.warning("cannot dump tracebacks: %s", error)
            return
        if not repeat:
            return
