"""Runs one synchronous node at a time on the child's main thread, where a signal can stop it.

A signal handler runs on the main thread and may raise there: a node that sleeps, computes or waits
for a subprocess gets the exception, and its `finally`, within a millisecond. No other thread can be
stopped that way. What comes while the main thread is taken (fan-out of several sync nodes) goes to
ordinary pool threads, which only the kill reaches.

It is the event loop's default executor, which is where LangChain runs synchronous nodes.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

_T = TypeVar("_T")
_WORKERS = 32


class RunCancelled(BaseException):
    """Raised in a synchronous node whose run is being stopped.

    Not an Exception, so that `except Exception` in a node does not swallow it; `finally` and
    `with` blocks run.
    """


def _for_the_loop(raised: BaseException) -> BaseException:
    """A node's `sys.exit` is its failure: handed on as it is, it would end the event loop."""
    if isinstance(raised, (SystemExit, KeyboardInterrupt)):
        described = RuntimeError(f"The node raised {type(raised).__name__}: {raised}")
        described.__cause__ = raised
        return described
    return raised


class _Work:
    """One call handed to the main thread; None in the inbox means "look up"."""

    def __init__(self, future: Future[Any], call: Callable[[], Any]) -> None:
        self.future = future
        self.call = call


class MainThreadExecutor(ThreadPoolExecutor):
    """`serve` is the main thread's side; `submit` may be called from any thread."""

    def __init__(self) -> None:
        super().__init__(max_workers=_WORKERS, thread_name_prefix="belay-node")
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
    def pool_is_busy(self) -> bool:
        """True while a call that did not fit on the main thread is still running."""
        return self._pooled > 0

    def serve(self, start: Callable[[], Future[_T]]) -> Future[_T]:
        """Start something, run on this thread what it hands over, return its future when done.

        `start` is called when this thread is already open for work, so that not even the first
        call can slip by to the pool.
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
        """Work handed over just before the run was done: its waiter has gone."""
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
        try:
            self._in_node = True
            result = work.call()
            self._in_node = False
        except BaseException as raised:  # noqa: BLE001  (handed to whoever waits for the node)
            self._in_node = False
            error = _for_the_loop(raised)
        # Free before the waiter hears of it: it may hand over the next node at once.
        self._set_free(True)
        if error is not None:
            work.future.set_exception(error)
        else:
            work.future.set_result(result)

    def raise_in_node(self) -> None:
        """Called by the signal handler, on the main thread: raises if a node is running there."""
        if self._in_node:
            self._in_node = False
            raise RunCancelled
