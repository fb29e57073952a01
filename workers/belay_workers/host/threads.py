"""The calls that the runs of a host hand to threads.

`ThreadPoolExecutor.submit` is replaced in this process, so that calls are known by their run in the
pools of the project and of libraries, too: a thread of such a pool works for one run after the
other.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial, wraps
from typing import Any

from belay_workers.host.gates import GatedRun, uninterrupted

_WORKERS = 64
#: Threads that write for all runs, and may wait for a server.
_OF_BELAY = ("belay-database", "belay-helper")


class RunThreads:
    """Counts the calls of runs on threads. Make it once in a host."""

    def __init__(self, on_started: Callable[[GatedRun], None]) -> None:
        """`on_started` is called after a call that has started a process."""
        self._on_started = on_started
        self._lock = threading.Lock()
        self._calls: Counter[GatedRun] = Counter()
        ThreadPoolExecutor.submit = self._counting(ThreadPoolExecutor.submit)  # type: ignore[method-assign]
        #: The default executor of the event loop.
        self.executor = ThreadPoolExecutor(_WORKERS, thread_name_prefix="belay-node")

    def work_for(self, run: GatedRun) -> bool:
        """Return whether a call of the run has not ended."""
        return self._calls[run] > 0

    def _counting(self, submit: Callable[..., Future[Any]]) -> Callable[..., Future[Any]]:
        @wraps(submit)
        def counting(pool: Any, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
            run = GatedRun.current()
            if run is None or pool._thread_name_prefix in _OF_BELAY:
                return submit(pool, fn, *args, **kwargs)
            return uninterrupted(
                self._submit, run, partial(submit, pool, run.call, fn, *args, **kwargs)
            )

        return counting

    def _submit(self, run: GatedRun, submit: Callable[[], Future[Any]]) -> Future[Any]:
        with self._lock:
            self._calls[run] += 1
        try:
            future = submit()
        except BaseException:
            self._end_call(run)
            raise
        future.add_done_callback(lambda _: self._end_call(run))
        self._attribute_callbacks(run, future)
        return future

    def _attribute_callbacks(self, run: GatedRun, future: Future[Any]) -> None:
        """Let what is called when a call on a thread has ended be the run's, too."""
        add = future.add_done_callback

        def add_of_run(function: Callable[[Future[Any]], Any]) -> None:
            with self._lock:
                self._calls[run] += 1
            add(partial(self._call_back, run, function))

        future.add_done_callback = add_of_run  # type: ignore[method-assign,assignment]

    def _call_back(
        self, run: GatedRun, function: Callable[[Future[Any]], Any], future: Future[Any]
    ) -> None:
        try:
            if not (run.is_frozen or run.is_stopped):
                run.call(function, future)
        finally:
            self._end_call(run)

    def _end_call(self, run: GatedRun) -> None:
        if run.has_started:
            self._on_started(run)
        with self._lock:
            self._calls[run] -= 1
            if not self._calls[run]:
                del self._calls[run]
