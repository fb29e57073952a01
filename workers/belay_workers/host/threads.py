"""The threads of a host: the calls that its runs hand to them, and the threads that runs start."""

from __future__ import annotations

import contextvars
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from belay_workers.host.gates import GatedRun

_T = TypeVar("_T")
_WORKERS = 64


class RunThreads(ThreadPoolExecutor):
    """The default executor of a host's event loop. It knows the run of each call."""

    def __init__(self, on_started: Callable[[GatedRun], None]) -> None:
        """`on_started` is called after a call that has started a process."""
        self._on_started = on_started
        super().__init__(max_workers=_WORKERS, thread_name_prefix="belay-node")
        self._lock = threading.Lock()
        self._calls: Counter[GatedRun] = Counter()

    def submit(self, fn: Callable[..., _T], /, *args: Any, **kwargs: Any) -> Future[_T]:
        run = GatedRun.current()
        if run is None:
            return super().submit(fn, *args, **kwargs)
        with self._lock:
            self._calls[run] += 1
        # What the call starts belongs to its run, too.
        context = contextvars.copy_context()
        future = super().submit(context.run, fn, *args, **kwargs)
        future.add_done_callback(lambda _: self._has_ended(run))
        return future

    def work_for(self, run: GatedRun) -> bool:
        """Return whether a call of the run has not ended."""
        return self._calls[run] > 0

    def _has_ended(self, run: GatedRun) -> None:
        if run.has_started:
            self._on_started(run)
        with self._lock:
            self._calls[run] -= 1
            if not self._calls[run]:
                del self._calls[run]
