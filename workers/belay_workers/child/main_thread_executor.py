"""Run synchronous nodes on the child's main thread, one at a time, where a signal can stop them.

A signal handler runs on the main thread and can raise there: a node that sleeps, computes or waits
for a subprocess gets the exception within a millisecond, and its `finally` blocks run. No other
thread can be stopped like that. While the main thread is in use (fan-out of several synchronous
nodes), further nodes run on ordinary pool threads, which only killing the process stops.

The executor is the default one of the event loop, on which LangChain runs synchronous nodes.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from belay_workers.execution.copies import end_copy
from belay_workers.execution.stops import RunCancelled

_T = TypeVar("_T")
_WORKERS = 32


def _for_the_loop(raised: BaseException) -> BaseException:
    """Turn a node's `sys.exit` into an error of the node: SystemExit would end the event loop."""
    if isinstance(raised, (SystemExit, KeyboardInterrupt)):
        described = RuntimeError(f"The node raised {type(raised).__name__}: {raised}")
        described.__cause__ = raised
        return described
    return raised


class _Work:
    """A call for the main thread. None in the inbox only wakes it."""

    def __init__(self, future: Future[Any], call: Callable[[], Any]) -> None:
        self.future = future
        self.call = call


class MainThreadExecutor(ThreadPoolExecutor):
    """An executor whose `serve` runs on the main thread; `submit` may be called from any thread."""

    def __init__(self, after_node: Callable[[], None] = lambda: None) -> None:
        """`after_node` is called on the main thread after each node that ran there."""
        super().__init__(max_workers=_WORKERS, thread_name_prefix="belay-node")
        self._after_node = after_node
        self._inbox: queue.SimpleQueue[_Work | None] = queue.SimpleQueue()
        self._hand_over = threading.Lock()
        self._main_is_free = False
        self._in_node = False
        self._pooled = 0

    def submit(self, fn: Callable[..., _T], /, *args: Any, **kwargs: Any) -> Future[_T]:
        future: Future[_T] = Future()
        with self._hand_over:
            if self._main_is_free:
                self._main_is_free = False
                self._inbox.put(_Work(future, lambda: fn(*args, **kwargs)))
                return future
            self._pooled += 1
        pooled = super().submit(fn, *args, **kwargs)
        pooled.add_done_callback(self._pool_call_done)
        return pooled

    def _pool_call_done(self, _: Future[Any]) -> None:
        with self._hand_over:
            self._pooled -= 1

    @property
    def is_shut_down(self) -> bool:
        """Return whether it takes no more calls, as after `loop.shutdown_default_executor()`."""
        return bool(self._shutdown)

    @property
    def pool_is_busy(self) -> bool:
        """Return whether a call is still running on a pool thread."""
        return self._pooled > 0

    def serve(self, start: Callable[[], Future[_T]]) -> Future[_T]:
        """Call `start`, run submitted calls on this thread, and return the future when it is done.

        This thread accepts calls before `start` is called, so the first one does not go to the
        pool.
        """
        self._set_free(True)
        try:
            started = start()
            started.add_done_callback(lambda _: self._inbox.put(None))
            while not started.done():
                work = self._inbox.get()
                if work is not None:
                    self._run(work)
        finally:
            self._set_free(False)
            self._refuse_leftovers()
        return started

    def _set_free(self, free: bool) -> None:
        with self._hand_over:
            self._main_is_free = free

    def _refuse_leftovers(self) -> None:
        """Cancel calls that were submitted just before the run was done: nothing waits for them."""
        while True:
            try:
                work = self._inbox.get_nowait()
            except queue.Empty:
                return
            if work is not None:
                work.future.cancel()

    def _run(self, work: _Work) -> None:
        if not work.future.set_running_or_notify_cancel():
            self._set_free(True)
            return
        error: BaseException | None = None
        result = None
        pid = os.getpid()
        try:
            self._in_node = True
            result = work.call()
            self._in_node = False
            end_copy(pid)
            self._after_node()
        except BaseException as raised:  # noqa: BLE001  (passed to the future)
            self._in_node = False
            end_copy(pid)
            error = _for_the_loop(raised)
            self._after_node()
        # Accept calls before the result is set: the next node may be submitted immediately.
        self._set_free(True)
        if error is not None:
            work.future.set_exception(error)
        else:
            work.future.set_result(result)

    def raise_in_node(self) -> None:
        """Raise RunCancelled if a node is running. Called by the signal handler (main thread)."""
        if self._in_node:
            self._in_node = False
            raise RunCancelled
