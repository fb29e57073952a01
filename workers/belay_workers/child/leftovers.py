"""Find what a run has left behind in its child process: threads and their work.

A thread that the run started is left behind while it lives. A thread of an earlier run (of a
library's client, a pool of the project, a tracer) may stay. It counts only while it works, as it
may work for this run.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any

from belay_workers.child.debugger import is_debuggers

#: The standard library's modules in which a thread waits.
_WAITING = ("threading", "queue", "selectors", "concurrent.futures.thread")
#: Packages whose threads export traces or errors, or serve a debugger. They are ignored.
_TRACERS = (
    *("langsmith", "langfuse", "opentelemetry", "posthog", "sentry_sdk"),
    *("debugpy", "pydevd", "_pydevd_bundle", "_pydev_bundle"),
)
#: Packages whose threads are ignored while they are idle.
_CLIENTS = ("psycopg_pool",)
#: Modules that start threads, or wrap the work of all threads.
_AROUND_THREADS = (
    "threading",
    "opentelemetry.instrumentation.threading",
    "sentry_sdk.integrations.threading",
)
_Stack = tuple[CodeType, ...]
#: A thread, or the identifier of one that was started without `threading`.
_Key = threading.Thread | int


@dataclass(frozen=True, slots=True)
class _Before:
    """What a thread did when the run began: its stack, outermost first, and its loop's tasks."""

    stack: _Stack
    tasks: frozenset[asyncio.Task[Any]]


class Leftovers:
    """Distinguishes the threads of one run from those that existed before it."""

    def __init__(self, own: set[threading.Thread]) -> None:
        """`own` are the threads of the child process itself."""
        self._own = own
        self._before: dict[_Key, _Before] = {}

    def begin_run(self) -> None:
        """Note the threads of earlier runs, and what they do."""
        self._before = {
            key: _Before(_stack(frame), _tasks(frame)) for key, frame in self._strangers()
        }

    def any_threads(self) -> bool:
        """Return whether there is a thread of any run."""
        return any(True for _ in self._strangers())

    def has_threads(self) -> bool:
        """Return whether a thread is left that the run started, or that may work for it."""
        return any(
            not _is_at_rest(frame, self._before.get(key)) for key, frame in self._strangers()
        )

    def _strangers(self) -> Iterator[tuple[_Key, FrameType | None]]:
        """Yield the threads that are neither Belay's nor of a library that does no work of a run
        on them."""
        threads = threading.enumerate()
        frames = sys._current_frames()
        for thread in threads:
            frame = frames.pop(thread.ident or 0, None)
            if frame is None and isinstance(thread, threading._DummyThread):
                continue  # one that was not started by `threading`, has logged, and has ended
            if not self._is_belays(thread) and not is_debuggers(thread) and not _is_librarys(frame):
                yield thread, frame
        # Threads of `_thread.start_new_thread`. One that `threading` starts is not in its list
        # for a moment, and is not Belay's either: that starts none during a run.
        for ident, frame in frames.items():
            if not _is_librarys(frame):
                yield ident, frame

    def _is_belays(self, thread: threading.Thread) -> bool:
        return thread in self._own or thread.name.startswith("belay-node")


def _is_at_rest(frame: FrameType | None, before: _Before | None) -> bool:
    """Return whether a thread waits for work where it was, or above, when the run began."""
    if before is None or frame is None or _tasks(frame) - before.tasks:
        return False
    at_work = _without_waiting(frame)
    return _stack(at_work) == before.stack[: len(_stack(at_work))]


def _without_waiting(frame: FrameType | None) -> FrameType | None:
    """Return the innermost frame that does not wait in the standard library."""
    while frame is not None and _module(frame) in _WAITING:
        frame = frame.f_back
    return frame


def _frames(frame: FrameType | None) -> Iterator[FrameType]:
    """Yield the frames of a stack, the innermost first."""
    while frame is not None:
        yield frame
        frame = frame.f_back


def _stack(frame: FrameType | None) -> _Stack:
    return tuple(one.f_code for one in _frames(frame))[::-1]


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))


def _is_librarys(frame: FrameType | None) -> bool:
    """Return whether the outermost function on a thread's stack is one of a tracer's, or of an idle
    client's."""
    modules = [_module(one) for one in _frames(frame) if _module(one) not in _AROUND_THREADS]
    if not modules:
        return False
    package = modules[-1].partition(".")[0]
    if package in _CLIENTS:
        is_waiting = frame is not None and _module(frame) in _WAITING
        return is_waiting and {one.partition(".")[0] for one in modules} <= {package, "queue"}
    return package in _TRACERS


def _tasks(frame: FrameType | None) -> frozenset[asyncio.Task[Any]]:
    """Return the tasks of the event loop that runs on this stack, if one does."""
    loops = [
        one.f_locals.get("self")
        for one in _frames(frame)
        if one.f_code is asyncio.BaseEventLoop.run_forever.__code__
    ]
    tasks: set[asyncio.Task[Any]] = set()
    for loop in loops:
        if isinstance(loop, asyncio.AbstractEventLoop):
            tasks |= asyncio.all_tasks(loop)
    return frozenset(tasks)
