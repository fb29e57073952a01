"""The calls that the runs of a host hand to threads.

`ThreadPoolExecutor.submit` is replaced in this process, so that calls are known by their run in the
pools of the project and of libraries, too: a thread of such a pool works for one run after the
other. So do the worker threads of anyio, which get their calls through queues.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial, wraps
from typing import Any

from belay_workers.host.gated_run import GatedRun, uninterrupted

_WORKERS = 64
#: Threads that write for all runs, and may wait for a server.
_OF_BELAY = ("belay-database", "belay-helper")


def is_of_anyio(thread: threading.Thread) -> bool:
    """Return whether a thread is one of anyio's worker threads."""
    kind = type(thread)
    return kind.__name__ == "WorkerThread" and kind.__module__.startswith("anyio.")


class _CallOfAnyio:
    """A call of a run on a thread of anyio, which is not executed if it was cancelled before."""

    def __init__(
        self, run: GatedRun, function: Callable[..., Any], on_end: Callable[[], None]
    ) -> None:
        self._run = run
        self._function = function
        self._on_end = on_end
        self._is_taken = threading.Lock()

    def __call__(self, *args: Any) -> Any:
        if not self._is_taken.acquire(blocking=False):
            return None
        try:
            return self._run.call(self._function, *args)
        finally:
            self._on_end()

    def cancel(self, _future: Any) -> None:
        """End the call, if the thread has not begun it. Its future is done."""
        if self._is_taken.acquire(blocking=False):
            self._on_end()


class _Executor(ThreadPoolExecutor):
    """An executor whose calls wait for a thread where no further one can be started, for want of
    memory or by a limit. Its base class raises RuntimeError, but the call is executed later."""

    def __init__(self) -> None:
        super().__init__(_WORKERS, thread_name_prefix="belay-node")
        self.submit(int).result()  # have one thread

    def _adjust_thread_count(self) -> None:
        try:
            super()._adjust_thread_count()
        except RuntimeError:
            if not self._threads:
                raise


class RunThreads:
    """Counts the calls of runs on threads. Make it once in a host."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._calls: Counter[GatedRun] = Counter()
        ThreadPoolExecutor.submit = self._counting(ThreadPoolExecutor.submit)  # type: ignore[method-assign]
        threading.Thread.start = self._starting(threading.Thread.start)  # type: ignore[method-assign,assignment]
        #: The default executor of the event loop.
        self.executor: ThreadPoolExecutor = _Executor()

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

    def _starting(
        self, start: Callable[[threading.Thread], None]
    ) -> Callable[[threading.Thread], None]:
        @wraps(start)
        def starting(thread: threading.Thread) -> None:
            if is_of_anyio(thread):
                queue: Any = thread.queue  # type: ignore[attr-defined]
                queue.put_nowait = partial(self._put, queue.put_nowait)
            start(thread)

        return starting

    def _put(self, put: Callable[[Any], None], item: Any) -> None:
        """Hand a call to a worker thread of anyio: its context, the function, the arguments and the
        future of its result; None ends the thread."""
        run = GatedRun.current()
        if run is None or item is None:
            put(item)
            return
        context, function, arguments, future, *rest = item
        call = _CallOfAnyio(run, function, partial(self._end_call, run))
        with self._lock:
            self._calls[run] += 1
        put((context, call, arguments, future, *rest))
        future.add_done_callback(call.cancel)

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
            run.call_back(function, future)
        finally:
            self._end_call(run)

    def _end_call(self, run: GatedRun) -> None:
        with self._lock:
            self._calls[run] -= 1
            if not self._calls[run]:
                del self._calls[run]
