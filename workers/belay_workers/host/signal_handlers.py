"""The signal handlers that runs of a host set.

Python calls a handler on the main thread, between two instructions of the code that is executed
there, which may be another run's or Belay's own. It is called in the context of the run that has
set it. An exception is raised only in code of that run, and logged elsewhere. A copy of the process
that the handler has made by `os.fork` ends when the handler returns.
"""

from __future__ import annotations

import _signal
import logging
import os
from collections.abc import Callable
from types import FrameType
from typing import Any

from belay_workers.execution.copies import end_copy
from belay_workers.host.gates import GatedRun, executed_run

log = logging.getLogger(__name__)


class _Handler:
    """A handler that a run has set."""

    def __init__(self, run: GatedRun, function: Callable[[int, FrameType | None], Any]) -> None:
        self._run = run
        self.function = function

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self._run.is_frozen or self._run.is_stopped:
            return
        pid = os.getpid()
        try:
            self._run.context.copy().run(self.function, number, frame)
        except BaseException:
            if executed_run() is self._run:
                raise
            log.exception("a signal handler of run %s raised in other code", self._run.claim.run_id)
        finally:
            end_copy(pid)


def attribute_handlers() -> None:
    """Attribute the handlers that are set from now on to the runs that set them.

    `signal.signal` and `signal.getsignal` call the functions that are replaced here.
    """
    set_handler, get_handler = _signal.signal, _signal.getsignal

    def set_of_run(number: int, handler: Any) -> Any:
        run = GatedRun.current()
        if run is not None and callable(handler):
            handler = _Handler(run, handler)
        return _as_set(set_handler(number, handler))

    def get_as_set(number: int) -> Any:
        return _as_set(get_handler(number))

    _signal.signal, _signal.getsignal = set_of_run, get_as_set


def _as_set(handler: Any) -> Any:
    """Return a handler as the code that has set it knows it."""
    return handler.function if isinstance(handler, _Handler) else handler
